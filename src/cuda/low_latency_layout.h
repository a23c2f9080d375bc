// The cut of low-latency memory, which plans know too.
#pragma once

#include "core/gpu_low_latency.h"
