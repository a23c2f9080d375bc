#include <anyep/event.h>

#include "native.h"

namespace anyep::python {

void bind_event(nb::module_& module) {
  nb::class_<Event>(module, "Event",
                    "The end of an operation. Copies share it; one that was made by hand is complete from the start.")
      .def(nb::init<>())
      .def("wait", &Event::wait, WithoutGil(),
           "Returns when the operation has ended; raises what went wrong, every time.")
      .def("done", &Event::done, "Has the operation ended, well or not? Never waits.")
      .def_static("manual", &Event::manual, "An event that complete() ends.")
      .def("complete", &Event::complete, "Of manual() only, once.");
  nb::class_<Pending>(module, "Pending", "The receive half of a low-latency operation.")
      .def(
          "receive", [](Pending& pending) { return pending.receive(); }, WithoutGil());
}

}  // namespace anyep::python
