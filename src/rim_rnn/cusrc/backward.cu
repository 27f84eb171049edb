// Backward, the steps of a chunk from its end: forward.cu mirrored, where d<name> is the gradient of <name>.
#include "common.cuh"

struct BackwardArguments {  // as above
  const float *grad_output;                   // (n, p), or null
  const float *cells, *cells_before, *before; // (n, u), (n, u), (n, p): after the step, before it; h before it
  const float *tilde;                         // h~, (n, p)
  float *squashed, *gates;                    // tanh(message) or message, (n, p); gates after activation, (n, 4*u), as csrc/problem.h
                                              // has them: replaced by dmessage and dgates
  const float *talk, *attention;              // queries, keys and values of h~, (n, talk); probabilities before dropout, (C, n, n)
  const float *z, *gates_x, *scores;
  const int* winners;                         // (k)
  const float *keep_input, *keep_comm;
  const float *weight_output, *weight_talk, *weight_hr, *weight_hh;  // transposed
  float *dh, *dc;                             // (N, n, p) and (N, n, u): after the chunk, and before it
  float *dtalk, *dtilde, *dscores;            // (n, talk), (n, p), (n, heads); dtilde of winners, where they are projected, or null
  void* said;
  unsigned* met;
  Steps time;
};

struct BackwardSaid {
  // What a reader tells the units that it read: the gradients of what it heard, and of the scores of each pair of head and unit.
  struct { float dheard[some(w) * R], dscore[some(C * n) * R]; } of_step[2];
};

struct BackwardMemory {
  Matrix<p, w, keep_output> weight_output;
  Matrix<talk, p, keep_talk> weight_talk;
  Matrix<p, projected ? u : 0, keep_hr> weight_hr;
  Matrix<G * u, p, keep_hh> weight_hh;
  alignas(16) BackwardSaid said;
  alignas(16) float dh[p * R], dc[lstm ? u * R : 1], dmessage[p * R], dprobability[some(C * n) * R];
  alignas(16) float dtalk[some(talk) * R], dcell_output[projected ? u * R : 4], dgates[G * u * R], dscore[heads * R];
  Sums<heads> sums;
};
static_assert(sizeof(BackwardMemory) == backward_bytes, "driver.py counts the same");

struct ScanBackward {
  const BackwardArguments& a;
  BackwardMemory& s;
  Circle<BackwardSaid>& circle;
  const int j, r, lane;
  const long long first_row;
  long long position = 0;
  bool there = false, won = false;

  __device__ ScanBackward(const BackwardArguments& a_, BackwardMemory& s_, Circle<BackwardSaid>& circle_, int j_, long long tile)
      : a(a_), s(s_), circle(circle_), j(j_), r(threadIdx.x % R), lane(threadIdx.x / R), first_row(tile * R) {}

  __device__ long long of_unit() const { return position * n + j; }
  __device__ const float* talk_of(int m, int head) const { return a.talk + (position * n + m) * talk + head * (2 * dk + dv); }
  __device__ long long pair(int head, int reader) const { return ((position * C + head) * n + reader) * n; }

  __device__ void begin() {
    const long long row = first_row + r;
    const bool is = row < a.time.batch;
    each<p>([&](int d, int) { s.dh[d * R + r] = is ? a.dh[(row * n + j) * p + d] : 0; });
    if (lstm) each<u>([&](int d, int) { s.dc[d * R + r] = is ? a.dc[(row * n + j) * u + d] : 0; });
  }
  __device__ void end() {
    const long long row = first_row + r;
    if (row >= a.time.batch) return;
    each<p>([&](int d, int) { a.dh[(row * n + j) * p + d] = s.dh[d * R + r]; });
    if (lstm) each<u>([&](int d, int) { a.dc[(row * n + j) * u + d] = s.dc[d * R + r]; });
  }

  // dh becomes the gradient of h~ but for what goes through queries, keys and values.
  __device__ void take_up_backward() {
    each<p>([&](int d, int) {
      const long long at = of_unit() * p + d;
      float dmessage = 0, dstate = s.dh[d * R + r];
      if (won) {
        const float squashed = a.squashed[at];
        dmessage = !bounded ? dstate : dstate * (1 - squashed * squashed);
        if (bounded && !lstm) {
          const float state = a.tilde[at], droom = room(state) > 0 ? dstate * squashed : 0;
          dmessage *= room(state);
          dstate = state > 0 ? dstate - droom : state < 0 ? dstate + droom : dstate;
        }
      }
      s.dh[d * R + r] = dstate;
      s.dmessage[d * R + r] = dmessage;
      if (there) a.squashed[at] = dmessage;
    });
    __syncthreads();
  }
  __device__ void exchange_backward(int turn) {
    auto& said = circle.own->of_step[turn & 1];
    s.weight_output.multiply(s.dmessage, a.weight_output, j, [&](int e, const float* row) { put(said.dheard + e * R, row); });
    __syncthreads();
    each<C * n>([&](int pair_, int) {
      const int head = pair_ / n, m = pair_ % n;
      float dprobability = 0;
      if (won) {
        const float* value = talk_of(m, head) + 2 * dk;
#pragma unroll 8
        for (int f = 0; f < dv; ++f) dprobability += circle.hear(said.dheard + (head * dv + f) * R + r) * value[f];
        if (a.keep_comm) dprobability *= a.keep_comm[pair(head, j) + m];
      }
      s.dprobability[pair_ * R + r] = dprobability;
    });
    __syncthreads();
    each<C * n>([&](int pair_, int) {
      const int head = pair_ / n, m = pair_ % n;
      float dscore = 0;
      if (won) {
        const float* attention = a.attention + pair(head, j);
        float mean = 0;
        for (int i = 0; i < n; ++i) mean += attention[i] * s.dprobability[(head * n + i) * R + r];
        dscore = attention[m] * (s.dprobability[pair_ * R + r] - mean);
      }
      said.dscore[pair_ * R + r] = dscore;
    });
  }
  __device__ void ask_and_show_backward(int turn) {
    auto& said = circle.own->of_step[turn & 1];
    each<talk>([&](int column, int) {
      const int head = column / (2 * dk + dv), at = column % (2 * dk + dv);
      float sum = 0;
      if (there)
        for (int m = 0; m < n; ++m) {
          if (at < dk) {  // unit j asked m
            sum += circle.hear(said.dscore + (head * n + m) * R + r) * talk_of(m, head)[dk + at];
          } else if (at < 2 * dk) {  // m asked unit j
            sum += circle.hear(circle.of(m, said.dscore + (head * n + j) * R + r)) * talk_of(m, head)[at - dk];
          } else {  // and heard it
            const long long of_pair = pair(head, m) + j;
            const float probability = a.keep_comm ? a.attention[of_pair] * a.keep_comm[of_pair] : a.attention[of_pair];
            sum += probability * circle.hear(circle.of(m, said.dheard + (head * dv + at - 2 * dk) * R + r));
          }
        }
      s.dtalk[column * R + r] = sum;
      if (there) a.dtalk[of_unit() * talk + column] = sum;
    });
    __syncthreads();
    s.weight_talk.multiply(s.dtalk, a.weight_talk, j, [&](int d, const float* row) { add(s.dh + d * R, row); });
    __syncthreads();
  }
  __device__ static void add(float* column, const float* row) {
#pragma unroll
    for (int i = 0; i < R; ++i) column[i] += row[i];
  }

  // dh and dc become the gradients of what was before the step, dh but for what goes through the gates and the query.
  __device__ void dynamics_backward() {
    if (projected) {
      each<p>([&](int d, int) {
        const float dstate = won ? s.dh[d * R + r] : 0;
        s.dmessage[d * R + r] = dstate;
        if (there) a.dtilde[of_unit() * p + d] = dstate;
      });
      __syncthreads();
      s.weight_hr.multiply(s.dmessage, a.weight_hr, j, [&](int d, const float* row) { put(s.dcell_output + d * R, row); });
      __syncthreads();
    }
    float da[heads] = {};
    each<u>([&](int d, int) {
      float dgate[4] = {}, dread[G] = {};
      if (won) {
        const float* gate = a.gates + of_unit() * 4 * u + d;
        const float dy = projected ? s.dcell_output[d * R + r] : s.dh[d * R + r];
        if (lstm)
          lstm_backward(gate, a.cells[of_unit() * u + d], a.cells_before[of_unit() * u + d], dy, s.dc[d * R + r], dgate);
        else
          gru_backward(gate, a.before[of_unit() * u + d], dy, s.dh[d * R + r], dgate);
        for (int g = 0; g < G; ++g) {
          dread[g] = dgate[!lstm && g == 2 ? 3 : g];
          for (int head = 0; head < heads; ++head) da[head] += dread[g] * a.gates_x[((of_unit() * heads + head) * G + g) * u + d];
        }
      }
      for (int g = 0; g < G; ++g) s.dgates[(g * u + d) * R + r] = dgate[g];
      if (there)
        for (int g = 0; g < 4; ++g) a.gates[(of_unit() * 4 + g) * u + d] = dgate[g];
    });
    for (int head = 0; head < heads; ++head) s.sums.put(head, da[head]);
    if (lstm && won) each<p>([&](int d, int) { s.dh[d * R + r] = 0; });
    __syncthreads();
  }
  __device__ static void lstm_backward(const float* gate, float cell, float before, float dy, float& dcell, float* dgate) {
    const float in = gate[0], forget = gate[u], candidate = gate[2 * u], out = gate[3 * u], squashed = tanhf(cell);
    const float dnow = dcell + dy * out * (1 - squashed * squashed);
    dgate[0] = dnow * candidate * in * (1 - in);
    dgate[1] = dnow * before * forget * (1 - forget);
    dgate[2] = dnow * in * (1 - candidate * candidate);
    dgate[3] = dy * squashed * out * (1 - out);
    dcell = dnow * forget;
  }
  // `dbefore` receives what reaches h directly, through z.
  __device__ static void gru_backward(const float* gate, float before, float dy, float& dbefore, float* dgate) {
    const float reset = gate[0], update = gate[u], candidate = gate[2 * u], from_h = gate[3 * u];
    const float dinner = dy * (1 - update) * (1 - candidate * candidate);
    dgate[0] = dinner * from_h * reset * (1 - reset);
    dgate[1] = dy * (before - candidate) * update * (1 - update);
    dgate[2] = dinner * reset;
    dgate[3] = dinner;
    dbefore = dy * update;
  }

  // A bid chooses and has no gradient; a winner's a_input has.
  __device__ void input_attention_backward() {
    if (lane == 0)
      for (int head = 0; head < heads; ++head) {
        float dscore = s.sums.total(head);
        if (there) {
          const long long at = of_unit() * heads + head;
          const float a_input = sigmoid(a.scores[at]);
          dscore *= a_input * (1 - a_input) * (a.keep_input ? a.keep_input[at] : 1);
          a.dscores[at] = dscore;
        }
        s.dscore[head * R + r] = dscore;
      }
    s.weight_hh.multiply(s.dgates, a.weight_hh, j, [&](int d, const float* row) { add(s.dh + d * R, row); });
    __syncthreads();
    if (won)
      each<p>([&](int d, int) {
        for (int head = 0; head < heads; ++head) s.dh[d * R + r] += s.dscore[head * R + r] * a.z[(of_unit() * heads + head) * p + d];
      });
  }

  __device__ void run(int& turn) {
    begin();
    long long step = a.time.steps - 1;
    while (step >= 0 && !a.time.present(a.time.time(step), first_row)) --step;
    for (; step >= 0; --step, ++turn) {
      const long long t = a.time.time(step);
      const int present = a.time.present(t, first_row);
      if (!present) break;
      position = a.time.start(t) + first_row + r, there = r < present, won = false;
      if (there)
        for (int i = 0; i < k; ++i) won |= a.winners[position * k + i] == j;
      if (there && a.grad_output) each<p>([&](int d, int) { s.dh[d * R + r] += a.grad_output[of_unit() * p + d]; });
      if (C) {
        take_up_backward();
        exchange_backward(turn);
        circle.arrive();
        circle.wait();
        ask_and_show_backward(turn);
      }
      dynamics_backward();
      input_attention_backward();
    }
    end();
  }
};

extern "C" __global__ void __launch_bounds__(threads) backward(const __grid_constant__ BackwardArguments a) {
  BackwardMemory& s = *reinterpret_cast<BackwardMemory*>(shared_memory());
  const int j = blockIdx.x % n, group = blockIdx.x / n, groups = gridDim.x / n;
  s.weight_hh.keep(a.weight_hh, j);
  if (projected) s.weight_hr.keep(a.weight_hr, j);
  if (C) s.weight_talk.keep(a.weight_talk, j), s.weight_output.keep(a.weight_output, j);
  Circle<BackwardSaid> circle(&s.said, a.said, a.met, group, j);
  int turn = 0;
  for (long long tile = group; tile < a.time.tiles; tile += groups) ScanBackward(a, s, circle, j, tile).run(turn);
  circle.arrive();
  circle.wait();
}
