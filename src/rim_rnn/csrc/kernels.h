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
  Dense<T>* dense;          // of each worker
  Share<T>* shares;         // of each unit
  Gradients<T>* gradients;  // of each block
  Block<T>* block;          // of each hand of each block

  // `count` of them, one after the other.
  template <class P, class... Arguments>
  static P* several(Arena& arena, int count, const Arguments&... arguments) {
    P* all = arena.take<P>(count);
    for (int i = 0; i < count; ++i) {
      const P one(arguments..., arena);
      if (arena.base) all[i] = one;
    }
    return all;
  }
  static int64_t setup(const Problem<T>& problem, void* storage, bool backward) {
    const Sizes& s = problem.s;
    Arena arena{static_cast<char*>(storage)};
    Run* run = arena.take<Run>(1);
    const Weights<T> weights(problem, arena, backward);
    Dense<T>* dense = several<Dense<T>>(arena, s.in_place ? 0 : s.workers, s);
    Share<T>* shares = several<Share<T>>(arena, backward ? s.n : 0, s);
    Gradients<T>* gradients = several<Gradients<T>>(arena, backward ? s.blocks : 0, problem);
    Block<T>* block = arena.take<Block<T>>(s.blocks * s.hands);
    if (storage) *run = Run{problem, backward, weights, dense, shares, gradients, block};
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
  static void prepare(void* storage, int worker) {
    Run& run = at(storage);
    const Sizes& s = run.problem.s;
    for (int j = worker; j < s.n; j += s.workers) rim::RIM_ISA::prepare(run.problem, run.weights, run.dense[worker], j, run.backward);
    if (worker == s.workers - 1) prepare_shared(run.problem, run.weights, run.backward);
  }
  static void forward(void* storage, int task, int64_t from, int64_t to) { at(storage).block[task].forward(from, to); }
  static void backward_(void* storage, int block) { at(storage).block[block].backward(at(storage).gradients[block]); }
  static void finish(void* storage, int worker) {
    Run& run = at(storage);
    const Sizes& s = run.problem.s;
    if (worker == s.workers) return finish_shared(run.problem, run.gradients, run.shares);
    for (int j = worker; j < s.n; j += s.workers)
      if (s.in_place)  // a unit's gradients where they belong, one block after the other
        for (int b = 0; b < s.blocks; ++b) run.block[b].sum_up_unit(run.gradients[0].unit[j], j, true, b > 0);
      else
        rim::RIM_ISA::finish(run.problem, run.gradients, run.dense[worker], run.shares[j], j);
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
