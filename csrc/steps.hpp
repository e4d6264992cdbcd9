// Jobs cut into steps when compiled, so that two of them can be woven: while the operations of one
// wait for each other, those of the other run. A processor's own window is too short for that: an
// update's words and its normals reach 0.70 of what Zen 5's ports allow one after the other, 0.77
// woven (benchmarks/ports.py).
//
// A job has `steps`, and run<0>() to run<steps - 1>() in that order.
#pragma once

#include "target.hpp"

namespace esfast::ESFAST_LANES {

template <int i = 0, class Job>
ESFAST_FN void run_steps(Job& job) {
  if constexpr (i < Job::steps) {
    job.template run<i>();
    run_steps<i + 1>(job);
  }
}

// Both jobs at an even pace, from step i of one and step j of the other.
template <int i = 0, int j = 0, class A, class B>
ESFAST_FN void weave(A& a, B& b) {
  if constexpr (i < A::steps && (2 * i + 1) * B::steps <= (2 * j + 1) * A::steps) {
    a.template run<i>();
    weave<i + 1, j>(a, b);
  } else if constexpr (j < B::steps) {
    b.template run<j>();
    weave<i, j + 1>(a, b);
  }
}

}  // namespace esfast::ESFAST_LANES
