// The boundary: the operators of torch.library, every size checked here once, then plain pointers to the kernels.
//
// Built against the stable ABI of libtorch 2.10, so that one binary serves that version and every newer one.
#if defined(__linux__)
#include <sys/mman.h>
#include <unistd.h>
#endif
#if defined(__x86_64__)
#include <cpuid.h>
#include <xmmintrin.h>
#endif
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <atomic>
#include <climits>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <initializer_list>
#include <optional>
#include <string>
#include <vector>

#include "problem.h"

#if !defined(STABLE_TORCH_ERROR_CODE_CHECK)  // its name in the headers of torch 2.10
#define STABLE_TORCH_ERROR_CODE_CHECK TORCH_ERROR_CODE_CHECK
#endif

namespace rim {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Optional = std::optional<Tensor>;

using Shape = std::vector<int64_t>;
using Braces = std::initializer_list<int64_t>;  // a shape written down, which asks for no memory

template <class AnyShape = Braces>
std::string shape_of(const AnyShape& shape) {
  std::string text;
  for (int64_t size : shape) text += (text.empty() ? "(" : ", ") + std::to_string(size);
  return (shape.size() ? text : "(") + (shape.size() == 1 ? ",)" : ")");
}

[[noreturn]] void fail(const std::string& message) { throw std::runtime_error("rim_rnn: " + message); }

template <class T>
int32_t dtype_of() { return sizeof(T) == 4 ? aoti_torch_dtype_float32() : aoti_torch_dtype_float64(); }

// A tensor as contiguous memory of the right type and shape.
template <class T>
class Input {
 public:
  template <class AnyShape = Braces>
  Input(const char* name, const Optional& tensor, const AnyShape& shape, bool present = true) {
    if (!present) {
      if (tensor) fail(std::string(name) + " should be None for this cell");
      return;
    }
    if (!tensor) fail(std::string(name) + " should be a tensor, got None");
    int32_t dtype;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(tensor->get(), &dtype));
    if (!tensor->is_cpu()) fail(std::string(name) + " should be on the CPU");
    if (dtype != dtype_of<T>()) fail(std::string(name) + " should have the dtype of input");
    const auto got = tensor->sizes();
    if (!std::equal(got.begin(), got.end(), shape.begin(), shape.end()))
      fail(std::string(name) + " should have shape " + shape_of(shape) + ", got " + shape_of(got));
    if (!tensor->is_contiguous()) copy_ = torch::stable::contiguous(*tensor);
    data_ = static_cast<const T*>((copy_ ? *copy_ : *tensor).const_data_ptr());
  }
  operator const T*() const { return data_; }

 private:
  const T* data_ = nullptr;
  Optional copy_;
};

#if defined(__x86_64__)
// Asked here: in zig's run-time library __builtin_cpu_supports says no to everything.
void ask_processor(bool& avx2, bool& avx512, bool& bfloat16) {
  unsigned a, b, c, d, kept = 0, rest;  // kept: the registers that the system keeps for a thread
  if (!__get_cpuid(1, &a, &b, &c, &d) || !(c & bit_OSXSAVE) || !(c & bit_FMA)) return;
  __asm__("xgetbv" : "=a"(kept), "=d"(rest) : "c"(0));
  constexpr unsigned wide = 0x06, widest = 0xe6, all = bit_AVX512F | bit_AVX512VL | bit_AVX512DQ | bit_AVX512BW;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return;
  avx2 = (kept & wide) == wide && (b & bit_AVX2);
  avx512 = avx2 && (kept & widest) == widest && (b & all) == all;
  bfloat16 = avx512 && __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a & 1 << 5);  // bit_AVX512BF16, where headers are new enough
}
#endif

// The instruction set: the best that the processor has, or the one that RIM_RNN_ISA names.
constexpr const char* ISAS[] = {"baseline", "avx2", "avx512"};  // as native.py has them

struct Processor {
  bool has[3] = {true, false, false}, products_in_bfloat16 = false;

  Processor() {
#if defined(__x86_64__)
    ask_processor(has[1], has[2], products_in_bfloat16);
#endif
  }
};
const Processor& processor() {
  static const Processor asked;
  return asked;
}

int64_t isa() {
  static const int64_t chosen = [] {
    const bool(&has)[3] = processor().has;
    const char* wanted = std::getenv("RIM_RNN_ISA");
    if (!wanted || !*wanted) return has[2] ? 2 : has[1] ? 1 : 0;
    for (int i = 0; i < 3; ++i)
      if (!std::strcmp(wanted, ISAS[i])) return has[i] ? i : (fail(std::string("RIM_RNN_ISA=") + wanted + ", which this processor does not have"), 0);
    fail(std::string("RIM_RNN_ISA should be baseline, avx2, avx512 or empty, got ") + wanted);
  }();
  return chosen;
}

template <class T>
Kernels<T> kernels() {
#if defined(__x86_64__)
  if (isa() == 2) return avx512::kernels<T>();
  if (isa() == 1) return avx2::kernels<T>();
#endif
  return baseline::kernels<T>();
}

constexpr int MOST = INT_MAX / 64;  // of a size: sums of a few are 32-bit integers in the kernels

int narrow(const char* name, int64_t size, int64_t most = MOST, const std::string& of = "") {
  if (size < 1 || size > most) fail(name + of + " should be from 1 to " + std::to_string(most) + ", got " + std::to_string(size));
  return static_cast<int>(size);
}

// The arguments that all operators share, in the order of the schema.
struct Arguments {
  const Tensor &input, &h;
  const Optional& c;
  const Tensor& query;
  const Optional& query_bias;
  const Tensor& key;
  const Optional& key_bias;
  const Tensor& value;
  const Optional& value_bias;
  const Tensor &weight_ih, &weight_hh;
  const Optional &bias_ih, &bias_hh, &weight_hr, &comm_query, &comm_key, &comm_value, &comm_output, &keep_input, &keep_comm;
  const std::vector<int64_t>& batch_sizes;
  int64_t k, heads, comm_heads;
  bool bounded, reverse, rounded;
};

int size_of(const char* name, const Tensor& tensor, int64_t dims, int64_t dim, int64_t most = MOST) {
  if (tensor.dim() != dims) fail(std::string(name) + " should have " + std::to_string(dims) + " dimensions, got " + std::to_string(tensor.dim()));
  return narrow(name, tensor.size(dim), most, ".size(" + std::to_string(dim) + ")");
}

int divided(const char* name, const Tensor& tensor, int64_t dims, int64_t dim, const char* by_name, int by) {
  const int size = size_of(name, tensor, dims, dim);
  if (size % by) fail(std::string(name) + ".size(" + std::to_string(dim) + ")=" + std::to_string(size) + " should be divisible by " + by_name + "=" + std::to_string(by));
  return size / by;
}

// Everything about a call but the memory of its results.
template <class T>
struct Call {
  Problem<T> problem{};
  std::vector<int64_t> batch_sizes, offsets;
  std::vector<Input<T>> inputs;  // keep copies of strided tensors alive
  Sizes& s = problem.s;
  Shape output_shape, h_shape, c_shape;

  explicit Call(const Arguments& a, bool backward) {
    const bool packed = !a.batch_sizes.empty();
    s.lstm = a.c.has_value(), s.bias = a.query_bias.has_value(), s.projected = a.weight_hr.has_value(), s.reverse = a.reverse;
    s.bounded = a.bounded && a.comm_heads > 0;
    s.n = size_of("input_attention.query.weight", a.query, 3, 0);
    s.p = size_of("input_attention.query.weight", a.query, 3, 1);
    s.u = divided("dynamics.weight_ih", a.weight_ih, 3, 2, "gates", s.lstm ? 4 : 3);
    s.input = size_of("input_attention.key.weight", a.key, 2, 1);
    s.k = narrow("k", a.k, s.n), s.heads = narrow("num_input_heads", a.heads);
    s.key = divided("input_attention.key.weight", a.key, 2, 0, "num_input_heads", s.heads);
    s.value = divided("input_attention.value.weight", a.value, 2, 0, "num_input_heads", s.heads);
    if (a.comm_heads) {
      s.comm_heads = narrow("num_comm_heads", a.comm_heads);
      if (!a.comm_query) fail("communication.query.weight should be a tensor, got None");
      if (!a.comm_value) fail("communication.value.weight should be a tensor, got None");
      s.comm_key = divided("communication.query.weight", *a.comm_query, 3, 2, "num_comm_heads", s.comm_heads);
      s.comm_value = divided("communication.value.weight", *a.comm_value, 3, 2, "num_comm_heads", s.comm_heads);
    }
    narrow("num_units * num_input_heads", int64_t(s.n) * s.heads), narrow("num_units * (num_comm_heads + 1)", s.n * (s.comm_heads + int64_t(1)));
    narrow("num_input_heads * (input_size + 1)", s.heads * (s.input + int64_t(1)));
    narrow("num_units * features of a unit's h", int64_t(s.n) * s.p, INT_MAX / 2), narrow("num_units * features of a unit's c", int64_t(s.n) * s.u, INT_MAX / 2);
    narrow("num_units * (k * num_comm_heads + 1)", s.n * (int64_t(s.k) * s.comm_heads + 1), INT_MAX / 16);

    // Time: the rows present at each step, and where they start.
    const int64_t dims = packed ? 2 : 3;
    if (a.input.dim() != dims) fail("input should have " + std::to_string(dims) + " dimensions, got " + std::to_string(a.input.dim()));
    const bool layered = a.h.dim() == 3;  // states as a layer has them: (1, batch, features)
    s.batch = size_of("h_0", a.h, 2 + layered, layered, INT_MAX / 2 / s.n);  // the kernels count pairs of a row and a unit
    if (packed && a.batch_sizes.front() != s.batch) fail("batch_sizes should start at h_0.size(0)=" + std::to_string(s.batch) + ", got " + std::to_string(a.batch_sizes.front()));
    if (!a.input.size(0)) fail("input.size(0) should be positive, got 0");
    batch_sizes = packed ? a.batch_sizes : std::vector<int64_t>(size_of("input", a.input, dims, 0), s.batch);
    int64_t previous = s.batch;
    for (int64_t present : batch_sizes) {
      if (present < 1) fail("batch_sizes should be positive, got " + std::to_string(present));
      if (present > previous) fail("batch_sizes should never grow, got " + std::to_string(present) + " after " + std::to_string(previous));
      previous = present;
      offsets.push_back(s.total);
      s.total += present;
    }
    if (packed && s.total != a.input.size(0)) fail("batch_sizes should sum to input.size(0)=" + std::to_string(a.input.size(0)) + ", got " + std::to_string(s.total));
    s.steps = static_cast<int64_t>(batch_sizes.size());
    s.batch_sizes = batch_sizes.data(), s.offsets = offsets.data();

    const int64_t n = s.n, p = s.p, u = s.u, d_q = int64_t(s.heads) * s.key, d_v = int64_t(s.heads) * s.value, gates = s.weight_gates();
    const bool comm = s.comm_heads > 0;
    inputs.reserve(20);
    const auto take = [&](const char* name, const Optional& tensor, Braces shape, bool present = true) -> const T* {
      return inputs.emplace_back(name, tensor, shape, present);
    };
    problem.input = inputs.emplace_back("input", a.input, packed ? Shape{s.total, s.input} : Shape{s.steps, s.batch, s.input});
    h_shape = layered ? Shape{1, s.batch, n * p} : Shape{s.batch, n * p};
    c_shape = layered ? Shape{1, s.batch, n * u} : Shape{s.batch, n * u};
    problem.h = inputs.emplace_back("h_0", a.h, h_shape);
    problem.c = inputs.emplace_back("c_0", a.c, c_shape, s.lstm);
    Parameters<const T>& w = problem.weight;
    w.query = take("input_attention.query.weight", a.query, {n, p, d_q});
    w.query_bias = take("input_attention.query.bias", a.query_bias, {n, d_q}, s.bias);
    w.key = take("input_attention.key.weight", a.key, {d_q, s.input});
    w.key_bias = take("input_attention.key.bias", a.key_bias, {d_q}, s.bias);
    w.value = take("input_attention.value.weight", a.value, {d_v, s.input});
    w.value_bias = take("input_attention.value.bias", a.value_bias, {d_v}, s.bias);
    w.weight_ih = take("dynamics.weight_ih", a.weight_ih, {n, d_v, gates});
    w.weight_hh = take("dynamics.weight_hh", a.weight_hh, {n, p, gates});
    w.bias_ih = take("dynamics.bias_ih", a.bias_ih, {n, gates}, s.bias);
    w.bias_hh = take("dynamics.bias_hh", a.bias_hh, {n, gates}, s.bias);
    w.weight_hr = take("dynamics.weight_hr", a.weight_hr, {n, u, p}, s.projected);
    if (!s.projected && u != p) fail("unit sizes of h and c should be equal without projections, got " + std::to_string(p) + " and " + std::to_string(u));
    w.comm_query = take("communication.query.weight", a.comm_query, {n, p, s.e()}, comm);
    w.comm_key = take("communication.key.weight", a.comm_key, {n, p, s.e()}, comm);
    w.comm_value = take("communication.value.weight", a.comm_value, {n, p, s.w()}, comm);
    w.comm_output = take("communication.output.weight", a.comm_output, {n, s.w(), p}, comm);
    problem.keep_input = take("keep_input", a.keep_input, {s.total, n, s.heads}, a.keep_input.has_value());
    problem.keep_comm = take("keep_comm", a.keep_comm, {s.total, s.comm_heads, n, n}, comm && a.keep_comm.has_value());

    if (double(s.total) * s.k * (s.heads + 5.0 * u + 2.0 * p + double(s.comm_heads) * n) > 1e18) fail("the rows of all steps are too many for backward to keep");
    s.input_scale = 1 / std::sqrt(double(s.key));
    s.comm_scale = comm ? 1 / std::sqrt(double(s.comm_key)) : 0;
    output_shape = packed ? Shape{s.total, n * p} : Shape{s.steps, s.batch, n * p};
    plan(backward, a.rounded);
  }

  // Which products to multiply out first, whether to pack the weights at all, and into how many blocks to cut the batch, by
  // counting multiplications.
  void plan(bool backward, bool rounded) {
    const double rows = double(s.total), in1 = s.in1(), gates = s.weight_gates(), passes = backward ? 3 : 1;
    const double apart_key = rows * s.heads * s.key * (s.input + s.n), folded_key = in1 * s.heads * s.n * (double(s.p) * s.key + rows);
    const double apart_value = rows * s.heads * s.value * (s.input + s.k * gates);
    const double folded_value = in1 * s.heads * gates * (double(s.n) * s.value + rows * s.k);
    const bool fold_key = folded_key < apart_key, fold_value = folded_value < apart_value;
    // A weight fetched at a step takes as long as a multiplication, one packed before the first as long as thirty (measured).
    const auto elements = [&](double S, double F) {
      return s.n * ((s.p1() + s.heads * F) * gates + s.p * (s.heads * S + 2.0 * s.e() + 2.0 * s.w()));
    };
    const double as_they_lie = apart_key + apart_value + s.steps * elements(s.key, s.value);
    const double packed = std::min(folded_key, apart_key) + std::min(folded_value, apart_value) +
                          (s.steps + 30) * elements(fold_key ? in1 : s.key, fold_value ? in1 : s.value);
    s.in_place = s.total <= MOST_IN_PLACE && as_they_lie < packed;
    s.rounded = rounded && !s.in_place && sizeof(T) == 4 && isa() == 2 && processor().products_in_bfloat16;
    s.fold_key = fold_key && !s.in_place, s.fold_value = fold_value && !s.in_place;
    const double step = double(s.k) * s.K() * gates + double(s.n) * s.p * (s.S() * s.heads + s.e() + s.w()) + double(s.k) * s.p * (s.e() + s.w());
    const double threads = torch::stable::get_num_threads();
    // A block is worth a thread where it has tens of microseconds of work in all, a hand where it has a few in every step.
    const double blocks = std::min({threads, double(s.batch), std::floor(passes * rows * step / 2e6) + 1});
    const double hands = std::min({threads, double(s.n), std::floor(double(s.batch) * step / 1.5e5) + 1});
    // In rows' worth of work: to fetch all weights takes as long as three rows do, and the waits of a step half a row.
    const bool by_units = s.in_place && !backward && std::max<double>(s.batch, 3) / hands + 0.5 < std::max(s.batch / blocks, 3.0);
    s.blocks = by_units ? 1 : int(blocks);
    s.hands = by_units ? int(hands) : 1;
    s.workers = int(std::min({threads, double(s.n), std::floor(elements(s.S(), s.F()) / 2.5e4) + 1}));
  }
};

// While one lives, this thread counts numbers smaller than the smallest normal one as 0, those that it reads and those that it
// computes. x86 takes some hundred cycles over each, and where a gradient vanishes over hundreds of steps most are such.
class Flushing {
#if defined(__x86_64__)
 public:
  Flushing() { _mm_setcsr(before_ | 0x8040); }
  ~Flushing() { _mm_setcsr(before_); }
  Flushing(const Flushing&) = delete;
  Flushing& operator=(const Flushing&) = delete;

 private:
  const unsigned before_ = _mm_getcsr();
#endif
};

// at::parallel_for over single tasks.
template <class F>
void parallel(int64_t tasks, const F& task) {
  const auto work = [&](int64_t begin, int64_t end) {
    [[maybe_unused]] const Flushing flushing;
    for (int64_t i = begin; i < end; ++i) task(i);
  };
  tasks == 1 ? work(0, 1) : torch::stable::parallel_for(0, tasks, 1, work);
}

// A large piece comes fresh from the system each time: in pages of 2 MB where it gives them, for each of 4 KB is a fault.
constexpr int64_t LARGE = 1 << 22;
void in_large_pages([[maybe_unused]] void* data, [[maybe_unused]] int64_t bytes) {
#if defined(MADV_HUGEPAGE)
  const int64_t page = sysconf(_SC_PAGESIZE);
  const uintptr_t first = (reinterpret_cast<uintptr_t>(data) + page - 1) / page * page;
  madvise(reinterpret_cast<void*>(first), (bytes - page) / page * page, MADV_HUGEPAGE);  // advice: whether it is taken is all one
#endif
}

// What a call computes in. One piece stays for the next call, for to fetch it again takes small calls as long as their
// arithmetic does; calls at the same time have pieces of their own, and the last to end leaves its own.
class Workspace {
 public:
  explicit Workspace(int64_t bytes) {
    piece_ = kept.exchange(nullptr);
    if (piece_ && piece_->bytes >= bytes) return;
    std::free(piece_);
    const int64_t all = (sizeof(Piece) + bytes + 63) / 64 * 64;
    piece_ = static_cast<Piece*>(std::aligned_alloc(64, all));
    if (!piece_) fail("not enough memory for a call: could not allocate " + std::to_string(all) + " bytes");
    if (all >= LARGE) in_large_pages(piece_, all);
    piece_->bytes = bytes;
  }
  ~Workspace() { std::free(kept.exchange(piece_->bytes <= MOST_KEPT ? piece_ : nullptr)); }
  Workspace(const Workspace&) = delete;
  Workspace& operator=(const Workspace&) = delete;
  void* data() const { return piece_ + 1; }

  static int64_t release() {
    Piece* piece = kept.exchange(nullptr);
    const int64_t bytes = piece ? piece->bytes : 0;
    std::free(piece);
    return bytes;
  }

 private:
  struct alignas(64) Piece {
    int64_t bytes;
  };
#if defined(__SANITIZE_ADDRESS__)
  static constexpr int64_t MOST_KEPT = 0;  // a piece of its own for each call, so that to go beyond it is seen
#else
  static constexpr int64_t MOST_KEPT = 64 << 20;
#endif
  static inline std::atomic<Piece*> kept{nullptr};
  Piece* piece_;
};

int64_t bytes_of(AtenTensorHandle tensor) {
  int64_t bytes;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_storage_size(tensor, &bytes));
  return bytes;
}

// Contiguous memory on the CPU. Straight from the C functions of the ABI: torch::stable::empty looks its operator up by name.
template <class AnyShape = Braces>
Tensor empty(const char* what, const AnyShape& shape, int32_t dtype) {
  int64_t strides[3], stride = 1;
  if (shape.size() > 3) fail("a result of more than 3 dimensions");
  for (size_t d = shape.size(); d-- > 0; stride *= shape.begin()[d]) strides[d] = stride;
  AtenTensorHandle made;
  if (aoti_torch_empty_strided(shape.size(), &*shape.begin(), strides, dtype, aoti_torch_device_type_cpu(), 0, &made) != AOTI_TORCH_SUCCESS) {
    const int64_t bytes = dtype == aoti_torch_dtype_float64() ? 8 : 4;
    fail(std::string("not enough memory for ") + what + " of shape " + shape_of(shape) + ": could not allocate " + std::to_string(stride * bytes) + " bytes");
  }
  const Tensor tensor(made);
  if (bytes_of(made) >= LARGE) in_large_pages(tensor.mutable_data_ptr(), bytes_of(made));
  return tensor;
}

template <class T>
T* data(const Tensor& tensor) {
  return static_cast<T*>(tensor.mutable_data_ptr());
}

// output, h_n, c_n, and what backward needs: winners, saved.
using Results = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

template <class T>
Results scan_as(const Arguments& a, bool save) {
  Call<T> call(a, false);
  Problem<T>& problem = call.problem;
  const Sizes& s = problem.s;
  const int32_t type = dtype_of<T>();
  const Tensor output = empty("output", call.output_shape, type), last_h = empty("h_n", call.h_shape, type);
  const Tensor last_c = s.lstm ? empty("c_n", call.c_shape, type) : empty("c_n", {0, int64_t(s.n) * s.u}, type);
  Tensor winners = output, saved = output;  // of no use where nothing is saved
  if (save) winners = empty("the winners", {s.total, s.k}, aoti_torch_dtype_int32()), saved = empty("what backward needs", {Saved<T>::size(s)}, type);
  problem.output = data<T>(output), problem.last_h = data<T>(last_h), problem.last_c = data<T>(last_c);
  problem.save = save;
  if (save) problem.saved = Saved<T>::in(data<T>(saved), data<int32_t>(winners), s);

  const Kernels<T> run = kernels<T>();
  const Workspace workspace(run.setup(problem, nullptr, false));
  void* at = workspace.data();
  run.setup(problem, at, false);
  if (!s.in_place) parallel(s.workers, [&](int64_t worker) { run.prepare(at, int(worker)); });
  const int64_t tasks = int64_t(s.blocks) * s.hands, phases = s.steps * PHASES;
  const int64_t together = s.hands == 1 ? phases : 1;  // phases without a hand waiting for others
  for (int64_t from = 0; from < phases; from += together)
    parallel(tasks, [&](int64_t task) { run.forward(at, int(task), from, from + together); });
  return {output, last_h, last_c, winners, saved};
}

template <class T>
std::vector<Tensor> scan_backward_as(const Arguments& a, const Optional& grad_output, const Optional& grad_h, const Optional& grad_c,
                                     const Tensor& output, const Tensor& winners, const Tensor& saved, bool input_grad) {
  Call<T> call(a, true);
  Problem<T>& problem = call.problem;
  const Sizes& s = problem.s;
  const int32_t type = dtype_of<T>();
  const Input<T> given_output("grad_output", grad_output, call.output_shape, grad_output.has_value());
  const Input<T> given_h("grad_h_n", grad_h, call.h_shape, grad_h.has_value());
  const Input<T> given_c("grad_c_n", grad_c, call.c_shape, s.lstm && grad_c.has_value());
  const Input<T> result("output", output, call.output_shape), kept("saved", saved, {Saved<T>::size(s)});
  if (winners.dim() != 2 || winners.size(0) != s.total || winners.size(1) != s.k || winners.scalar_type() != ScalarType::Int || !winners.is_contiguous())
    fail("winners should be a contiguous int32 tensor of shape " + shape_of({s.total, s.k}));
  const int32_t* won = static_cast<const int32_t*>(winners.const_data_ptr());
  for (int64_t i = 0; i < s.total * s.k; ++i) {
    const int32_t least = i % s.k ? won[i - 1] + 1 : 0;
    if (won[i] < least || won[i] >= s.n) fail("winners of a row should ascend, from 0 to " + std::to_string(s.n - 1) + ", got " + std::to_string(won[i]));
  }
  problem.grad_output = given_output, problem.grad_last_h = given_h, problem.grad_last_c = given_c;
  problem.output = const_cast<T*>(static_cast<const T*>(result));
  problem.saved = Saved<T>::in(const_cast<T*>(static_cast<const T*>(kept)), const_cast<int32_t*>(won), s);

  // Gradients in the order of the schema, those of absent parameters left out.
  std::vector<Tensor> grads;
  const auto like = [&](const Optional& tensor) -> T* {
    if (!tensor) return nullptr;
    grads.push_back(empty("a gradient", tensor->sizes(), type));
    return data<T>(grads.back());
  };
  const Optional nothing;
  if (input_grad)
    problem.grad_input = like(a.input);
  else
    grads.push_back(empty("no gradient", {0}, type));
  problem.grad_h = like(a.h), problem.grad_c = like(a.c);
  Parameters<T>& g = problem.grad;
  g.query = like(a.query), g.query_bias = like(a.query_bias), g.key = like(a.key), g.key_bias = like(a.key_bias);
  g.value = like(a.value), g.value_bias = like(a.value_bias), g.weight_ih = like(a.weight_ih), g.weight_hh = like(a.weight_hh);
  g.bias_ih = like(a.bias_ih), g.bias_hh = like(a.bias_hh), g.weight_hr = like(a.weight_hr);
  g.comm_query = like(a.comm_query), g.comm_key = like(a.comm_key), g.comm_value = like(a.comm_value), g.comm_output = like(a.comm_output);

  const Kernels<T> run = kernels<T>();
  const Workspace workspace(run.setup(problem, nullptr, true));
  void* at = workspace.data();
  run.setup(problem, at, true);
  if (!s.in_place) parallel(s.workers, [&](int64_t worker) { run.prepare(at, int(worker)); });
  parallel(s.blocks, [&](int64_t block) { run.backward(at, int(block)); });
  parallel(s.workers, [&](int64_t worker) { run.finish(at, int(worker)); });
  parallel(1, [&](int64_t) { run.finish(at, s.workers); });
  return grads;
}

// The schema, and the same as C++ declares and passes it. Parameters by their names in the state_dict; absent ones are None.
#define RIM_SCHEMA                                                                                                             \
  "Tensor input, Tensor h, Tensor? c, Tensor query, Tensor? query_bias, Tensor key, Tensor? key_bias, Tensor value, "          \
  "Tensor? value_bias, Tensor weight_ih, Tensor weight_hh, Tensor? bias_ih, Tensor? bias_hh, Tensor? weight_hr, "              \
  "Tensor? comm_query, Tensor? comm_key, Tensor? comm_value, Tensor? comm_output, Tensor? keep_input, Tensor? keep_comm, "     \
  "int[] batch_sizes, int k, int heads, int comm_heads, bool bounded, bool reverse, bool rounded"
#define RIM_DECLARED                                                                                                           \
  Tensor input, Tensor h, Optional c, Tensor query, Optional query_bias, Tensor key, Optional key_bias, Tensor value,          \
  Optional value_bias, Tensor weight_ih, Tensor weight_hh, Optional bias_ih, Optional bias_hh, Optional weight_hr,             \
  Optional comm_query, Optional comm_key, Optional comm_value, Optional comm_output, Optional keep_input, Optional keep_comm,  \
  std::vector<int64_t> batch_sizes, int64_t k, int64_t heads, int64_t comm_heads, bool bounded, bool reverse, bool rounded
#define RIM_PASSED                                                                                                             \
  input, h, c, query, query_bias, key, key_bias, value, value_bias, weight_ih, weight_hh, bias_ih, bias_hh, weight_hr,         \
  comm_query, comm_key, comm_value, comm_output, keep_input, keep_comm, batch_sizes, k, heads, comm_heads, bounded, reverse, rounded

bool is_double(const Tensor& input) {
  const ScalarType type = input.scalar_type();
  if (type != ScalarType::Float && type != ScalarType::Double) fail("input should be float32 or float64");
  return type == ScalarType::Double;
}

Results scan(RIM_DECLARED) {
  const Arguments a{RIM_PASSED};
  return is_double(input) ? scan_as<double>(a, true) : scan_as<float>(a, true);
}

std::tuple<Tensor, Tensor, Tensor> infer(RIM_DECLARED) {
  const Arguments a{RIM_PASSED};
  const Results all = is_double(input) ? scan_as<double>(a, false) : scan_as<float>(a, false);
  return {std::get<0>(all), std::get<1>(all), std::get<2>(all)};
}

std::vector<Tensor> scan_backward(Optional grad_output, Optional grad_h, Optional grad_c, Tensor output, Tensor winners, Tensor saved,
                                  bool input_grad, RIM_DECLARED) {
  const Arguments a{RIM_PASSED};
  return is_double(input) ? scan_backward_as<double>(a, grad_output, grad_h, grad_c, output, winners, saved, input_grad)
                          : scan_backward_as<float>(a, grad_output, grad_h, grad_c, output, winners, saved, input_grad);
}

// No exception leaves this library, which may have another C++ run-time library than libtorch has: its message does, and libtorch
// throws an error of its own. That one passes through guarded(), which therefore has nothing to clean up.
using Boxed = void(StableIValue* stack, uint64_t given, uint64_t returned);
using Message = char[4096];

template <Boxed operation>
[[gnu::noinline]] bool fails(StableIValue* stack, uint64_t given, uint64_t returned, Message& message) {
  try {
    operation(stack, given, returned);
    return false;
  } catch (const std::exception& error) {
    std::snprintf(message, sizeof message, "%s", error.what());
    return true;
  }
}

template <Boxed operation>
void guarded(StableIValue* stack, uint64_t given, uint64_t returned) {
  Message message;
  if (fails<operation>(stack, given, returned, message)) aoti_torch_check(false, __func__, __FILE__, __LINE__, message);
}

}  // namespace
}  // namespace rim

STABLE_TORCH_LIBRARY(rim_rnn, m) {
  m.def("isa() -> int");  // by its place among baseline, avx2, avx512
  m.def("release() -> int");  // bytes that were kept between calls and are free now
  m.def("infer(" RIM_SCHEMA ") -> (Tensor output, Tensor h_n, Tensor c_n)");
  m.def("scan(" RIM_SCHEMA ") -> (Tensor output, Tensor h_n, Tensor c_n, Tensor winners, Tensor saved)");
  m.def("scan_backward(Tensor? grad_output, Tensor? grad_h, Tensor? grad_c, Tensor output, Tensor winners, Tensor saved, "
        "bool input_grad, " RIM_SCHEMA ") -> Tensor[]");
}

STABLE_TORCH_LIBRARY_IMPL(rim_rnn, CompositeExplicitAutograd, m) {
  m.impl("isa", &rim::guarded<TORCH_BOX(&rim::isa)>);
  m.impl("release", &rim::guarded<TORCH_BOX(&rim::Workspace::release)>);
}

STABLE_TORCH_LIBRARY_IMPL(rim_rnn, CPU, m) {
  m.impl("infer", &rim::guarded<TORCH_BOX(&rim::infer)>);
  m.impl("scan", &rim::guarded<TORCH_BOX(&rim::scan)>);
  m.impl("scan_backward", &rim::guarded<TORCH_BOX(&rim::scan_backward)>);
}
