// The table of kernels of one instruction set; included by one translation unit for each.
#pragma once
#include "kernels.h"
#include "kernels/attention.h"
#include "kernels/elementwise.h"
#include "kernels/largest.h"
#include "kernels/linear.h"
#include "kernels/neurons.h"
#include "kernels/noise.h"
#include "kernels/normalise.h"
#include "kernels/pages.h"
#include "kernels/rope.h"
#include "kernels/signs.h"
#include "kernels/sparse_linear.h"
#include "kernels/threshold.h"

namespace fallow {

template <class S>
constexpr Kernels make_kernels() {
  return {S::name,          kernels::linear<S>,   kernels::sparse_linear<S>, kernels::quantise<S>, kernels::rms_norm<S>,  kernels::add<S>,   kernels::gate<S>,
          kernels::mix<S>,  kernels::soft_cap<S>, kernels::above_threshold<S>, kernels::keep_largest<S>, kernels::zero_within<S>, kernels::rope<S>, kernels::attention<S>, kernels::merge<S>,
          kernels::finish<S>, kernels::summarise<S>, kernels::choose_pages<S>, kernels::neurons<S>, kernels::spread<S>,
          kernels::perturb<S>, kernels::sign_tables<S>, kernels::screen<S>, kernels::second_look<S>, kernels::screened_peaks<S>,
          kernels::list_reaching<S>, kernels::list_largest<S>};
}

}  // namespace fallow
