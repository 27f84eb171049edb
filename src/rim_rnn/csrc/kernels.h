// The kernels of one instruction set, in the namespace RIM_ISA: what problem.h declares, by way of step.h.
#include <new>

#include "step.h"

namespace rim {
namespace RIM_ISA {

// One call: the problem, and where in the storage everything has its place.
template <class T>
struct Run {
  Problem<T> problem;
  bool backward;
  Weights<T> weights;
  Dense<T>* dense;          // of each unit
  Gradients<T>* gradients;  // of each block
  Block<T>* block;          // of each hand of each block

  static int64_t setup(const Problem<T>& problem, void* storage, bool backward) {
    const Sizes& s = problem.s;
    Arena arena{static_cast<char*>(storage)};
    Run* run = arena.take<Run>(1);
    const Weights<T> weights(problem, arena, backward);
    Dense<T>* dense = arena.take<Dense<T>>(s.n);
    for (int j = 0; j < s.n && !s.in_place; ++j) {
      const Dense<T> of_unit(s, arena);
      if (storage) dense[j] = of_unit;
    }
    Gradients<T>* gradients = arena.take<Gradients<T>>(s.blocks);
    for (int b = 0; b < s.blocks && backward; ++b) {
      const Gradients<T> of_block(problem, arena);
      if (storage) gradients[b] = of_block;
    }
    Block<T>* block = arena.take<Block<T>>(s.blocks * s.hands);
    if (storage) *run = Run{problem, backward, weights, dense, gradients, block};
    Arena shared{nullptr}, own{nullptr};
    Block<T>(problem, weights, shared, own, 0, 0, backward);  // the largest
    for (int b = 0; b < s.blocks; ++b) {
      char* of_block = arena.take<char>(shared.used);
      for (int hand = 0; hand < s.hands; ++hand) {
        char* of_hand = arena.take<char>(own.used);
        if (!storage) continue;
        Arena shared_{of_block}, own_{of_hand};
        new (block + b * s.hands + hand) Block<T>(run->problem, run->weights, shared_, own_, b, hand, backward);
      }
    }
    return arena.used;
  }
  static Run& at(void* storage) { return *static_cast<Run*>(storage); }
  static void prepare(void* storage, int task) {
    Run& run = at(storage);
    rim::RIM_ISA::prepare(run.problem, run.weights, run.dense, task, run.backward);
  }
  static void forward(void* storage, int task, int64_t from, int64_t to) { at(storage).block[task].forward(from, to); }
  static void backward_(void* storage, int block) { at(storage).block[block].backward(at(storage).gradients[block]); }
  static void finish(void* storage, int task) {
    Run& run = at(storage);
    if (run.problem.s.in_place && task < run.problem.s.n)  // a unit's gradients where they belong, one block after the other
      for (int b = 0; b < run.problem.s.blocks; ++b) run.block[b].sum_up_unit(run.gradients[0].unit[task], task, true, b > 0);
    else
      rim::RIM_ISA::finish(run.problem, run.gradients, run.dense, task);
  }
};

template <class T>
Kernels<T> kernels() {
  return {Run<T>::setup, Run<T>::prepare, Run<T>::forward, Run<T>::backward_, Run<T>::finish};
}
template Kernels<float> kernels<float>();
template Kernels<double> kernels<double>();

}  // namespace RIM_ISA
}  // namespace rim
