// Where an engine finds a rank's test tensors: the host memory that tests fill and look at, or a copy of it on a GPU.
#pragma once

#include <anyep/config.h>
#include <anyep/handle.h>
#include <anyep/types.h>

#include <memory>
#include <vector>

#include "support/inputs.h"

namespace anyep::test {

/// As it is: of CPU ranks, whose engines use the tests' own memory.
class Mirror {
 public:
  virtual ~Mirror() = default;
  /// The GPU of this rank, as Topology has it.
  virtual int device() const { return -1; }
  virtual StreamRef stream() const { return {}; }
  /// What the engine gets instead of a tensor of `uploaded` memory.
  virtual TensorView at(const TensorView& view) const { return view; }
  /// Contents and guards as they are now, there.
  virtual void upload(const Tensors&) {}
  /// Contents and guards as the engine has left them, here.
  virtual void download(const Tensors&) {}
  /// Memory that the engine gave: `here` stands for it; its first contents are those of `here`.
  virtual TensorView stand_in(Tensors&, const TensorView& theirs) { return theirs; }
  /// A copy of an array that the engine gave.
  virtual std::vector<std::byte> fetch(const TensorView& theirs) const;
  virtual void zero(const TensorView& theirs);

  Routing at(const Routing& routing) const;
  Rows at(const Rows& rows) const;
  CombineInput at(const CombineInput& in) const;
  ExpertSlabs at(const ExpertSlabs& slabs) const;
};

/// How many GPUs this process sees.
int num_gpus();
/// On the GPU `rank` mod num_gpus(), with a stream that waits for no other. @throws std::runtime_error
std::unique_ptr<Mirror> gpu_mirror(int rank);

}  // namespace anyep::test
