// The wait for data that carry their epoch: several words or packets of one thread at once. wait.h waits for one word.
#pragma once

#include "protocol/wait.h"

namespace anyep::protocol {

/// Polls until ready() finds everything there. From time to time asks go_on(), which looks at abort, clock and masks and
/// leaves the record; once it says no, what has landed still counts. False: it is not there.
template <class Ready, class GoOn>
[[nodiscard]] ANYEP_HD inline bool wait_ready(Ready&& ready, GoOn&& go_on) {
  for (unsigned polls = 1; !ready(); ++polls) {
    if (polls % kPollsPerCheck == 0 && !go_on()) return ready();
  }
  return true;
}

}  // namespace anyep::protocol
