// Forward: all steps of a chunk, in one launch.
#include "common.cuh"

struct ForwardArguments {  // rows of the chunk come first, unless it says otherwise; what may be null is not wanted, or not there
  const float *z, *z_bias, *gates_x;      // (n, heads, p), (n, heads) or null, (n, heads, G*u): see Scan::input_attention
  const float *keep_input, *keep_comm;    // dropout: (n, heads), (C, n, n); or null
  const float *weight_hh, *bias, *weight_hr, *weight_talk, *weight_output;  // of all units; bias (n, 4*u), or null
  float *h, *c;                           // (N, n, p) and (N, n, u): before the chunk, and after it
  float *output, *cells, *tilde, *scores; // (n, p), (n, u), (n, p), (n, heads); all but output may be null
  float* attention;                       // before dropout, (C, n readers, n read), or null
  unsigned char* won;                     // (n), or null
  void* said;
  unsigned* met;
  Steps time;
};

struct ForwardSaid {
  float bids[2][R];  // of steps with an even number, and an odd one: one is read while the next is written
  float read[some(shown) * R];
};

struct ForwardMemory {
  Matrix<p, G * u, keep_hh> weight_hh;
  Matrix<u, projected ? p : 0, keep_hr> weight_hr;
  Matrix<p, talk, keep_talk> weight_talk;
  Matrix<w, p, keep_output> weight_output;
  alignas(16) ForwardSaid said;
  // [feature][row of the tile]
  alignas(16) float h[p * R], c[lstm ? u * R : 1], bias[4 * u];
  alignas(16) float gates[G * u * R], cell_output[projected ? u * R : 4], message[p * R];
  alignas(16) float score[heads * R], query[some(C * dk) * R], attention[some(C * n) * R], heard[some(w) * R];
  Sums<heads> sums;
};
static_assert(sizeof(ForwardMemory) == forward_bytes, "driver.py counts the same");

struct Scan {
  const ForwardArguments& a;
  ForwardMemory& s;
  Circle<ForwardSaid>& circle;
  const int j, r, lane;  // unit, row of the tile, first feature
  const long long first_row;

  // The step at hand.
  long long position = 0;  // of this thread's row
  bool there = false, won = false;
  // What the next step needs of x, loaded before it begins.
  float z[share(p)][heads], z_bias[heads], gates_x[share(u)][heads][G];

  __device__ Scan(const ForwardArguments& a_, ForwardMemory& s_, Circle<ForwardSaid>& circle_, int j_, long long tile)
      : a(a_), s(s_), circle(circle_), j(j_), r(threadIdx.x % R), lane(threadIdx.x / R), first_row(tile * R) {}

  __device__ long long of_unit() const { return position * n + j; }

  __device__ void first_states() {
    const long long row = first_row + r;
    const bool is = row < a.time.batch;
    each<p>([&](int d, int) { s.h[d * R + r] = is ? a.h[(row * n + j) * p + d] : 0; });
    if (lstm) each<u>([&](int d, int) { s.c[d * R + r] = is ? a.c[(row * n + j) * u + d] : 0; });
  }
  __device__ void last_states() {
    const long long row = first_row + r;
    if (row >= a.time.batch) return;
    each<p>([&](int d, int) { a.h[(row * n + j) * p + d] = s.h[d * R + r]; });
    if (lstm) each<u>([&](int d, int) { a.c[(row * n + j) * u + d] = s.c[d * R + r]; });
  }

  __device__ void look_ahead(long long t) {
    if (r >= a.time.present(t, first_row)) return;
    const long long next = (a.time.start(t) + first_row + r) * n + j;
    each<p, ALL>([&](int d, int x) {
      for (int head = 0; head < heads; ++head) z[x][head] = a.z[(next * heads + head) * p + d];
    });
    for (int head = 0; head < heads; ++head) z_bias[head] = a.z_bias ? a.z_bias[next * heads + head] : 0;
    each<u, ALL>([&](int d, int x) {
      for (int head = 0; head < heads; ++head)
        for (int g = 0; g < G; ++g) gates_x[x][head][g] = a.gates_x[((next * heads + head) * G + g) * u + d];
    });
  }

  // Input attention, equation 2: score = query . key / sqrt(key size). With query = h W^q + b^q this is h . z + z_bias, where
  // z = W^q key / sqrt(key size) and z_bias = b^q . key / sqrt(key size) depend on x alone. A bid is a score averaged over heads.
  __device__ void input_attention(int turn) {
    for (int head = 0; head < heads; ++head) {
      float part = 0;
      if (there) each<p, ALL>([&](int d, int x) { part += s.h[d * R + r] * z[x][head]; });
      s.sums.put(head, part);
    }
    __syncthreads();
    if (lane) return;
    float bid = 0;
    for (int head = 0; head < heads; ++head) {
      const float score = s.sums.total(head) + (there ? z_bias[head] : 0);
      s.score[head * R + r] = score;
      bid += score;
      if (there && a.scores) a.scores[of_unit() * heads + head] = score;
    }
    circle.own->bids[turn & 1][r] = bid / heads;
  }

  // Competition: the k highest bids win, ties to the lowest unit, NaN below all.
  __device__ void competition(int turn) {
    const float* said = &circle.own->bids[turn & 1][r];
    const float mine = circle.hear(said);
    int ahead = 0;
    for (int m = 0; m < n; ++m) {
      const float other = circle.hear(circle.of(m, said));
      const bool alike = other == mine || (other != other && mine != mine);
      ahead += other > mine || (mine != mine && other == other) || (alike && m < j);
    }
    won = there && ahead < k;
    if (there && lane == 0 && a.won) a.won[of_unit()] = won;
  }

  // Independent dynamics, equation 4: the winners' LSTM or GRU; losers keep h and c. s.gates has h W_hh of every row.
  __device__ void dynamics() {
    float a_input[heads];  // softmax([0, score])_1 = sigmoid(score), after dropout
    for (int head = 0; head < heads; ++head) {
      a_input[head] = sigmoid(s.score[head * R + r]);
      if (there && a.keep_input) a_input[head] *= a.keep_input[of_unit() * heads + head];
    }
    each<u, ALL>([&](int d, int x) {
      if (won) {
        float read[G], gate[G];
        for (int g = 0; g < G; ++g) {
          read[g] = 0;
          for (int head = 0; head < heads; ++head) read[g] += a_input[head] * gates_x[x][head][g];
          gate[g] = s.gates[(g * u + d) * R + r] + s.bias[g * u + d];
        }
        float* to = projected ? s.cell_output : s.h;
        to[d * R + r] = lstm ? lstm_unit(read, gate, s.c[d * R + r]) : gru_unit(read, gate, s.bias[3 * u + d], s.h[d * R + r]);
      }
      if (lstm && there && a.cells) a.cells[of_unit() * u + d] = s.c[d * R + r];
    });
    if (projected) {
      __syncthreads();
      s.weight_hr.multiply(s.cell_output, a.weight_hr, j, [&](int d, const float* row) { put(s.message + d * R, row); });
      __syncthreads();
      if (won) each<p>([&](int d, int) { s.h[d * R + r] = s.message[d * R + r]; });
    }
    if (there && a.tilde) each<p>([&](int d, int) { a.tilde[of_unit() * p + d] = s.h[d * R + r]; });
  }
  // c~ = f c + i g, h~ = o tanh(c~)
  __device__ static float lstm_unit(const float* read, const float* gate, float& cell) {
    const float in = sigmoid(read[0] + gate[0]), forget = sigmoid(read[1] + gate[1]);
    const float candidate = tanhf(read[2] + gate[2]), out = sigmoid(read[G - 1] + gate[G - 1]);
    cell = forget * cell + in * candidate;
    return out * tanhf(cell);
  }
  // n = tanh(W_in x + b_in + r (W_hn h + b_hn)), h~ = (1 - z) n + z h
  __device__ static float gru_unit(const float* read, const float* gate, float bias, float state) {
    const float reset = sigmoid(read[0] + gate[0]), update = sigmoid(read[1] + gate[1]);
    const float candidate = tanhf(read[2] + bias + reset * gate[2]);
    return (1 - update) * candidate + update * state;
  }

  // Communication, equations 5 and 6: message = softmax(query . key / sqrt(key size)) value W^o, and h = h~ + room * tanh(message),
  // or h~ + message as printed. The root rides on the weights of the queries.
  __device__ void ask_and_show() {
    __syncthreads();
    s.weight_talk.multiply(s.h, a.weight_talk, j, [&](int column, const float* row) {
      const int head = column / (2 * dk + dv), at = column % (2 * dk + dv);
      put(at < dk ? s.query + (head * dk + at) * R : circle.own->read + (head * (dk + dv) + at - dk) * R, row);
    });
  }
  __device__ void exchange() {
    each<C * n>([&](int pair, int) {
      const int head = pair / n, m = pair % n;
      const float* key = circle.of(m, circle.own->read + head * (dk + dv) * R + r);
      float score = 0;
#pragma unroll 8
      for (int f = 0; f < dk; ++f) score += s.query[(head * dk + f) * R + r] * circle.hear(key + f * R);
      s.attention[pair * R + r] = score;
    });
    __syncthreads();
    each<w>([&](int e, int) {
      const int head = e / dv;
      const float* scores = s.attention + head * n * R + r;
      const float* value = circle.own->read + (head * (dk + dv) + dk + e % dv) * R + r;
      const long long pairs = ((position * C + head) * n + j) * n;
      const float* keep = there && a.keep_comm ? a.keep_comm + pairs : nullptr;
      float highest = scores[0], total = 0, sum = 0;
      for (int m = 1; m < n; ++m) highest = fmaxf(highest, scores[m * R]);
      for (int m = 0; m < n; ++m) {
        const float power = expf(scores[m * R] - highest);
        total += power;
        sum += (keep ? power * keep[m] : power) * circle.hear(circle.of(m, value));
      }
      s.heard[e * R + r] = sum / total;
      if (there && a.attention && e % dv == 0)
        for (int m = 0; m < n; ++m) a.attention[pairs + m] = expf(scores[m * R] - highest) / total;
    });
    __syncthreads();
  }
  // What was heard, through W^o, onto the winners' states.
  __device__ void take_up() {
    s.weight_output.multiply(s.heard, a.weight_output, j, [&](int d, const float* row) { put(s.message + d * R, row); });
    __syncthreads();
    if (won)
      each<p>([&](int d, int) {
        const float message = s.message[d * R + r], state = s.h[d * R + r];
        s.h[d * R + r] = state + (!bounded ? message : lstm ? tanhf(message) : room(state) * tanhf(message));
      });
  }

  __device__ void run(int& turn) {
    first_states();
    long long step = 0;
    while (step < a.time.steps && !a.time.present(a.time.time(step), first_row)) ++step;
    if (step < a.time.steps) look_ahead(a.time.time(step));
    for (; step < a.time.steps; ++step, ++turn) {
      const long long t = a.time.time(step);
      const int present = a.time.present(t, first_row);
      if (!present) break;
      position = a.time.start(t) + first_row + r, there = r < present;
      input_attention(turn);
      circle.arrive();
      s.weight_hh.multiply(s.h, a.weight_hh, j, [&](int d, const float* row) { put(s.gates + d * R, row); });
      circle.wait();    // others arrived before their product:
      __syncthreads();  // this is for it
      competition(turn);
      dynamics();
      if (step + 1 < a.time.steps) look_ahead(a.time.time(step + 1));
      if (C) {
        ask_and_show();
        circle.arrive();
        circle.wait();
        exchange();
        take_up();
      }
      if (there) each<p>([&](int d, int) { a.output[of_unit() * p + d] = s.h[d * R + r]; });
    }
    last_states();
  }
};

extern "C" __global__ void __launch_bounds__(threads) forward(const __grid_constant__ ForwardArguments a) {
  ForwardMemory& s = *reinterpret_cast<ForwardMemory*>(shared_memory());
  const int j = blockIdx.x % n, group = blockIdx.x / n, groups = gridDim.x / n;
  s.weight_hh.keep(a.weight_hh, j);
  if (projected) s.weight_hr.keep(a.weight_hr, j);
  if (C) s.weight_talk.keep(a.weight_talk, j), s.weight_output.keep(a.weight_output, j);
  for (int i = threadIdx.x; i < 4 * u; i += threads) s.bias[i] = a.bias ? a.bias[j * 4 * u + i] : 0;
  Circle<ForwardSaid> circle(&s.said, a.said, a.met, group, j);
  int turn = 0;
  for (long long tile = group; tile < a.time.tiles; tile += groups) Scan(a, s, circle, j, tile).run(turn);
  circle.arrive();  // nobody leaves while others read what it says
  circle.wait();
}
