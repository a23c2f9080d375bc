// How ranks meet: an all-gather that Python brings, and groups of threads or forked processes of one host.
#include <anyep/bootstrap.h>
#include <anyep/error.h>
#include <nanobind/stl/unique_ptr.h>
#include <nanobind/stl/vector.h>

#include <cstring>
#include <memory>

#include "native.h"

namespace anyep::python {
namespace {

/// `all_gather(bytes) -> bytes` (rank order) is called with the interpreter's lock, wherever the call comes from.
std::unique_ptr<Bootstrap> callback_bootstrap(int rank, int num_ranks, nb::callable all_gather) {
  const std::shared_ptr<nb::callable> callback(new nb::callable(std::move(all_gather)), [](nb::callable* held) {
    const nb::gil_scoped_acquire gil;
    delete held;
  });
  return std::make_unique<CallbackBootstrap>(
      rank, num_ranks, [callback](std::span<const std::byte> mine, std::span<std::byte> all) {
        const nb::gil_scoped_acquire gil;
        const nb::object gathered = (*callback)(nb::bytes(mine.data(), mine.size()));
        nb::bytes result;
        if (!nb::try_cast(gathered, result) || result.size() != all.size()) {
          throw Error(ErrorCode::kArgument, "the group's all-gather: bytes of every rank's " +
                                                std::to_string(mine.size()) + " bytes in rank order are needed, " +
                                                std::to_string(all.size()) + " in all");
        }
        std::memcpy(all.data(), result.c_str(), all.size());
      });
}

}  // namespace

void bind_bootstrap(nb::module_& module) {
  nb::class_<Bootstrap>(module, "Bootstrap", "How the ranks of a group meet when an engine is created.")
      .def_prop_ro("rank", &Bootstrap::rank)
      .def_prop_ro("num_ranks", &Bootstrap::num_ranks);
  module.def("callback_bootstrap", &callback_bootstrap, nb::arg("rank"), nb::arg("num_ranks"), nb::arg("all_gather"));

  nb::class_<LocalGroup>(
      module, "LocalGroup",
      "Ranks of one host that are started together, as threads or as forked processes. Make it once, "
      "before they start; each rank takes member(rank).")
      .def(nb::init<int>(), nb::arg("num_ranks"))
      .def_prop_ro("num_ranks", &LocalGroup::num_ranks)
      .def("member", &LocalGroup::member, nb::arg("rank"),
           "The bootstrap of one rank. A process that ends while it holds one is a death at once; one that has let go "
           "of "
           "it before, after two seconds in which no other process has taken the rank.")
      .def(
          "member_without",
          [](const LocalGroup& group, int rank, const std::vector<int>& gone) {
            return group.member_without(rank, gone);
          },
          nb::arg("rank"), nb::arg("gone"), WithoutGil(),
          "A new group without the given ranks; the others are numbered anew, ascending.");
}

}  // namespace anyep::python
