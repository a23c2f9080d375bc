#include <anyep/event.h>

#include "native.h"

namespace anyep::python {
namespace {

/// As torch's events: with a stream, that stream waits, the host does not.
void wait(const Event& event, nb::handle stream) {
  if (stream.is_none()) {
    const nb::gil_scoped_release release;
    event.wait();
    return;
  }
  const auto native = nb::cast<std::uintptr_t>(nb::isinstance<nb::int_>(stream) ? nb::object(nb::borrow(stream))
                                                                                : stream.attr("cuda_stream"));
  const nb::gil_scoped_release release;  // on CPU ranks the caller waits
  event.make_wait(stream_ref(native));
}

}  // namespace

void bind_event(nb::module_& module) {
  nb::class_<Event>(module, "Event",
                    "The end of an operation. Copies share it; one that was made by hand is complete from the start. "
                    "torch.cuda.Stream.wait_event takes those of GPU ranks.")
      .def(nb::init<>())
      .def("wait", &wait, nb::arg("stream") = nb::none(),
           "Returns when the operation has ended; raises what went wrong, every time. With a stream (torch.cuda.Stream "
           "or its number) that stream waits instead, and the host does not.")
      .def("synchronize", &Event::wait, WithoutGil(), "wait(), by torch's name.")
      .def("done", &Event::done, "Has the operation ended, well or not? Never waits.")
      .def("query", &Event::done, "done(), by torch's name.")
      .def_static("manual", &Event::manual, "An event that complete() ends.")
      .def("complete", &Event::complete, "Of manual() only, once.");
  nb::class_<Pending>(module, "Pending", "The receive half of a low-latency operation.")
      .def(
          "receive", [](Pending& pending, std::uintptr_t stream) { return pending.receive(stream_ref(stream)); },
          nb::arg("stream") = 0, WithoutGil())
      .def(
          "event", [](Pending& pending) { return pending.receive(); }, "Of an operation without a hook.");
}

}  // namespace anyep::python
