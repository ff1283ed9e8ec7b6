// Sparse paths of fast feed-forward layers, and what int8 layers do around their product, on the CPU: float32,
// contiguous, without gradients.
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <optional>
#include <tuple>
#include <vector>

namespace {

using at::Tensor;

// Registers of a processor hold the sums of kTokens tokens times kVectors vectors of outputs.
#if defined(__AVX512F__)
constexpr int64_t kLanes = 16, kVectors = 4;
#else
constexpr int64_t kLanes = 8, kVectors = 2;
#endif
constexpr int64_t kTokens = 6;
// Up to so many tokens, weights are read from one end to the other; more of them share what the nearest cache holds.
constexpr int64_t kFewTokens = 2;
constexpr int64_t kWidth = kLanes * kVectors;

typedef float Lanes __attribute__((vector_size(sizeof(float) * kLanes)));

inline Lanes load(const float* place) {
  Lanes lanes;
  __builtin_memcpy(&lanes, place, sizeof(lanes));
  return lanes;
}

inline void store(float* place, const Lanes& lanes) { __builtin_memcpy(place, &lanes, sizeof(lanes)); }

inline float dot(const float* left, const float* right, int64_t size) {
  Lanes sums[4] = {};  // four of them, as an addition waits for the one before it
  int64_t place = 0;
  for (; place + 4 * kLanes <= size; place += 4 * kLanes)
    for (int64_t part = 0; part < 4; ++part)
      sums[part] += load(left + place + part * kLanes) * load(right + place + part * kLanes);
  for (; place + kLanes <= size; place += kLanes) sums[0] += load(left + place) * load(right + place);
  const Lanes all = (sums[0] + sums[1]) + (sums[2] + sums[3]);
  float total = 0;
  for (int64_t lane = 0; lane < kLanes; ++lane) total += all[lane];
  for (; place < size; ++place) total += left[place] * right[place];
  return total;
}

// Follows a token from the root on, and returns the child of the last node that it meets.
template <typename Visit>
inline int64_t walk(
    const float* token, const float* weight, const float* bias, int64_t size, int64_t levels, const Visit& visit) {
  int64_t node = 0;
  for (int64_t level = 0; level < levels; ++level) {
    const float logit = dot(token, weight + node * size, size) + bias[node];
    visit(level, node, logit);
    node = 2 * node + 1 + (logit > 0);
  }
  return node;
}

// As `descend` of fast_feedforward.py.
std::tuple<Tensor, Tensor> descend(const Tensor& tokens, const Tensor& weight, const Tensor& bias, int64_t levels) {
  const int64_t count = tokens.size(0), size = tokens.size(1), trees = weight.size(0), nodes = weight.size(1);
  Tensor places = at::empty({count, trees, levels}, tokens.options().dtype(at::kLong));
  Tensor logits = at::empty({count, trees, levels}, tokens.options());
  const float *token = tokens.const_data_ptr<float>(), *rows = weight.const_data_ptr<float>();
  const float* biases = bias.const_data_ptr<float>();
  int64_t* place = places.data_ptr<int64_t>();
  float* logit = logits.data_ptr<float>();
  at::parallel_for(0, count * trees, 64, [&](int64_t begin, int64_t end) {
    for (int64_t way = begin; way < end; ++way) {
      const int64_t tree = way % trees;
      const auto visit = [&](int64_t level, int64_t node, float value) {
        place[way * levels + level] = node;
        logit[way * levels + level] = value;
      };
      walk(token + way / trees * size, rows + tree * nodes * size, biases + tree * nodes, size, levels, visit);
    }
  });
  return {places, logits};
}

// As `sort_by_leaf` of fast_feedforward.py.
std::tuple<Tensor, Tensor> sort_by_leaf(const Tensor& tokens, const Tensor& weight, const Tensor& bias, int64_t depth) {
  const int64_t count = tokens.size(0), size = tokens.size(1), leaves = int64_t(1) << depth;
  const float *token = tokens.const_data_ptr<float>(), *rows = weight.const_data_ptr<float>();
  const float* biases = bias.const_data_ptr<float>();
  std::vector<int64_t> leaf(count), next(leaves + 1, 0);
  at::parallel_for(0, count, 64, [&](int64_t begin, int64_t end) {
    for (int64_t number = begin; number < end; ++number)
      leaf[number] = walk(token + number * size, rows, biases, size, depth, [](int64_t, int64_t, float) {}) - (leaves - 1);
  });
  Tensor order = at::empty({count}, tokens.options().dtype(at::kLong));
  Tensor counts = at::zeros({leaves}, tokens.options().dtype(at::kLong));
  int64_t *places = order.data_ptr<int64_t>(), *numbers = counts.data_ptr<int64_t>();
  for (int64_t number = 0; number < count; ++number) ++numbers[leaf[number]];
  for (int64_t group = 0; group < leaves; ++group) next[group + 1] = next[group] + numbers[group];
  for (int64_t number = 0; number < count; ++number) places[next[leaf[number]]++] = number;
  return {order, counts};
}

// Some tokens times a strip of the weights, which is `vectors` vectors wide.
template <int64_t tokens, int64_t vectors>
inline void tile(
    const float* const* token, const float* weight, const float* bias, float* const* output, int64_t column,
    int64_t inputs, int64_t outputs) {
  Lanes sums[tokens][vectors];
  for (int64_t j = 0; j < vectors; ++j) {
    const Lanes start = load(bias + column + j * kLanes);
    for (int64_t i = 0; i < tokens; ++i) sums[i][j] = start;
  }
  for (int64_t input = 0; input < inputs; ++input) {
    const float* row = weight + input * outputs + column;
    Lanes lanes[vectors];
    for (int64_t j = 0; j < vectors; ++j) lanes[j] = load(row + j * kLanes);
    for (int64_t i = 0; i < tokens; ++i)
      for (int64_t j = 0; j < vectors; ++j) sums[i][j] += token[i][input] * lanes[j];
  }
  for (int64_t i = 0; i < tokens; ++i)
    for (int64_t j = 0; j < vectors; ++j) store(output[i] + column + j * kLanes, sums[i][j]);
}

template <int64_t tokens>
inline void strip(
    const float* const* token, const float* weight, const float* bias, float* const* output, int64_t column,
    int64_t last, int64_t inputs, int64_t outputs) {
  for (; column + kWidth <= last; column += kWidth)
    tile<tokens, kVectors>(token, weight, bias, output, column, inputs, outputs);
  for (; column + kLanes <= last; column += kLanes)
    tile<tokens, 1>(token, weight, bias, output, column, inputs, outputs);
  for (; column < last; ++column)
    for (int64_t i = 0; i < tokens; ++i) {
      float total = bias[column];
      for (int64_t input = 0; input < inputs; ++input) total += token[i][input] * weight[input * outputs + column];
      output[i][column] = total;
    }
}

// One token times the weights, row by row, as they lie in memory.
inline void rows_of_weights(
    const float* token, const float* weight, const float* bias, float* output, int64_t column, int64_t last,
    int64_t inputs, int64_t outputs) {
  std::copy(bias + column, bias + last, output + column);
  int64_t input = 0;
  for (; input + 4 <= inputs; input += 4) {
    const float *row = weight + input * outputs, *own = token + input;
    int64_t place = column;
    for (; place + kLanes <= last; place += kLanes) {
      Lanes total = load(output + place);
      for (int64_t part = 0; part < 4; ++part) total += own[part] * load(row + part * outputs + place);
      store(output + place, total);
    }
    for (; place < last; ++place)
      for (int64_t part = 0; part < 4; ++part) output[place] += own[part] * row[part * outputs + place];
  }
  for (; input < inputs; ++input)
    for (int64_t place = column; place < last; ++place)
      output[place] += token[input] * weight[input * outputs + place];
}

// As `grouped_linear` of fast_feedforward.py, with tokens and outputs where they are: `order` holds the tokens of each
// group, one group after the other.
Tensor grouped_linear(
    const Tensor& tokens, const Tensor& order, const Tensor& counts, const Tensor& weight, const Tensor& bias) {
  const int64_t inputs = tokens.size(1), groups = weight.size(0), outputs = weight.size(2);
  Tensor result = at::empty({tokens.size(0), outputs}, tokens.options());
  const float *token = tokens.const_data_ptr<float>(), *weights = weight.const_data_ptr<float>();
  const float* biases = bias.const_data_ptr<float>();
  const int64_t *places = order.const_data_ptr<int64_t>(), *numbers = counts.const_data_ptr<int64_t>();
  float* output = result.data_ptr<float>();

  struct Work {
    int64_t group, first, count, column, last;
  };
  std::vector<Work> work;
  // Of few tokens long pieces of rows are read, but every thread gets some.
  const int64_t pieces = std::max<int64_t>(at::get_num_threads() / std::max<int64_t>(tokens.size(0), 1), 1);
  const int64_t width_of_few = (outputs + pieces * kWidth - 1) / (pieces * kWidth) * kWidth;
  for (int64_t group = 0, first = 0; group < groups; first += numbers[group++]) {
    const int64_t width = numbers[group] <= kFewTokens ? std::min(width_of_few, 8 * kWidth) : kWidth;
    for (int64_t column = 0; numbers[group] > 0 && column < outputs; column += width)
      work.push_back({group, first, numbers[group], column, std::min(column + width, outputs)});
  }
  at::parallel_for(0, static_cast<int64_t>(work.size()), 1, [&](int64_t begin, int64_t end) {
    for (int64_t number = begin; number < end; ++number) {
      const Work& own = work[number];
      const float *matrix = weights + own.group * inputs * outputs, *own_bias = biases + own.group * outputs;
      for (int64_t done = 0; done < own.count;) {
        const float* from[kTokens];
        float* to[kTokens];
        const int64_t now = std::min(own.count - done, own.count <= kFewTokens ? 1 : kTokens);
        for (int64_t i = 0; i < now; ++i) {
          from[i] = token + places[own.first + done + i] * inputs;
          to[i] = output + places[own.first + done + i] * outputs;
        }
        const auto with = [&](auto run) { run(from, matrix, own_bias, to, own.column, own.last, inputs, outputs); };
        if (own.count <= kFewTokens)
          rows_of_weights(from[0], matrix, own_bias, to[0], own.column, own.last, inputs, outputs);
        else if (now == 6) with(strip<6>);
        else if (now == 5) with(strip<5>);
        else if (now == 4) with(strip<4>);
        else if (now == 3) with(strip<3>);
        else if (now == 2) with(strip<2>);
        else with(strip<1>);
        done += now;
      }
    }
  });
  return result;
}

// By their places in ACTIVATIONS of fast_feedforward.py.
inline float activate(float value, int64_t activation) {
  if (activation == 1) return value > 0 ? value : 0;
  return 0.5f * value * (1 + std::erf(value * 0.70710678f));  // GELU
}

inline void prefetch(const float* row, int64_t size) {
  for (int64_t place = 0; place < size; place += 16) __builtin_prefetch(row + place);
}

// As `NeuronTrees.sparse`, in one go: while a neuron is computed, what comes after it is on its way from memory.
Tensor neuron_trees(
    const Tensor& tokens, const Tensor& weight, const Tensor& bias, const Tensor& table,
    const std::optional<Tensor>& out_bias, int64_t levels, int64_t activation) {
  const int64_t count = tokens.size(0), size = tokens.size(1), trees = weight.size(0), nodes = weight.size(1);
  Tensor result = at::empty({count, size}, tokens.options());
  const float *token = tokens.const_data_ptr<float>(), *rows = weight.const_data_ptr<float>();
  const float *biases = bias.const_data_ptr<float>(), *outputs = table.const_data_ptr<float>();
  const float* start = out_bias.has_value() ? out_bias->const_data_ptr<float>() : nullptr;
  float* output = result.data_ptr<float>();
  at::parallel_for(0, count, 32, [&](int64_t begin, int64_t end) {
    for (int64_t number = begin; number < end; ++number) {
      const float* given = token + number * size;
      float* own = output + number * size;
      if (start != nullptr) std::copy(start, start + size, own);
      else std::fill(own, own + size, 0.0f);
      for (int64_t tree = 0; tree < trees; ++tree) {
        const float *in = rows + tree * nodes * size, *out = outputs + tree * nodes * size;
        for (int64_t level = 0, node = 0; level < levels; ++level) {
          prefetch(out + node * size, size);
          if (level + 1 < levels) prefetch(in + (2 * node + 1) * size, 2 * size);  // both children are neighbours
          const float logit = dot(given, in + node * size, size) + biases[tree * nodes + node];
          const float times = activate(logit, activation);
          const float* row = out + node * size;
          int64_t column = 0;
          for (; column + kLanes <= size; column += kLanes)
            store(own + column, load(own + column) + times * load(row + column));
          for (; column < size; ++column) own[column] += times * row[column];
          node = 2 * node + 1 + (logit > 0);
        }
      }
    }
  });
  return result;
}

// A product and a sum are rounded one after the other here, as PyTorch rounds them, and not together.
#if defined(__clang__)
#define FASTBERT_APART
#else
#define FASTBERT_APART __attribute__((noinline, optimize("fp-contract=off")))
#endif

// Rounds the numbers of one token to bytes: row * steps + nothing, where half goes to the even one.
FASTBERT_APART void round_row(
    const float* row, uint8_t* own, int64_t width, float steps, float nothing, float last) {
#if defined(__clang__)
#pragma clang fp contract(off)
#endif
  typedef uint8_t Bytes __attribute__((vector_size(kLanes)));
  typedef int32_t Integers __attribute__((vector_size(sizeof(int32_t) * kLanes)));
  constexpr float kHalfEven = 12582912.0f;  // 1.5 * 2^23: added and taken away, it rounds as torch.round does
  int64_t place = 0;
  for (; place + kLanes <= width; place += kLanes) {
    Lanes given;
    __builtin_memcpy(&given, row + place, sizeof(given));
    const Lanes level = ((given * steps + kHalfEven) - kHalfEven) + nothing;
    const Lanes capped = level > last ? Lanes{} + last : level;
    const Bytes bytes = __builtin_convertvector(__builtin_convertvector(capped, Integers), Bytes);
    __builtin_memcpy(own + place, &bytes, sizeof(bytes));
  }
  for (; place < width; ++place)
    own[place] = static_cast<uint8_t>(std::min(std::nearbyint(row[place] * steps) + nothing, last));
}

// As `quantise_tokens` of int8_products.py: each row is read from memory once.
std::tuple<Tensor, Tensor, Tensor> quantise_tokens(
    const Tensor& rows, int64_t levels, double smallest, int64_t result_rows) {
  const int64_t count = rows.size(0), width = rows.size(1);
  TORCH_CHECK(result_rows >= count, "there must be a row for each of ", count, " tokens, not ", result_rows);
  Tensor result = at::empty({result_rows, width}, rows.options().dtype(at::kByte));
  Tensor scales = at::empty({count, 1}, rows.options()), zeros = at::empty({count, 1}, rows.options());
  const float *given = rows.const_data_ptr<float>(), last = static_cast<float>(levels);
  uint8_t* output = result.data_ptr<uint8_t>();
  float *scale = scales.data_ptr<float>(), *zero = zeros.data_ptr<float>();
  at::parallel_for(0, count, std::max<int64_t>(1, 16384 / std::max<int64_t>(width, 1)), [&](int64_t begin, int64_t end) {
    for (int64_t number = begin; number < end; ++number) {
      const float* row = given + number * width;
      uint8_t* own = output + number * width;
      Lanes largest = {}, least = {}, unfit = {};  // the last becomes NaN where a value is not finite
      int64_t place = 0;
      for (; place + kLanes <= width; place += kLanes) {
        const Lanes lanes = load(row + place);
        largest = lanes > largest ? lanes : largest;
        least = lanes < least ? lanes : least;
        unfit += lanes * 0.0f;
      }
      float most = 0, fewest = 0, fault = 0;
      for (int64_t lane = 0; lane < kLanes; ++lane) {
        most = std::max(most, largest[lane]);
        fewest = std::min(fewest, least[lane]);
        fault += unfit[lane];
      }
      for (; place < width; ++place) {
        most = std::max(most, row[place]);
        fewest = std::min(fewest, row[place]);
        fault += row[place] * 0.0f;
      }
      const float step = std::max((most - fewest) / last, static_cast<float>(smallest));
      const float steps = 1.0f / step;  // dividing takes several times as long
      const float nothing = std::nearbyint(-fewest * steps);
      scale[number] = step + fault;
      zero[number] = nothing;
      if (!std::isfinite(scale[number])) {  // there are no bytes for it
        std::fill(own, own + width, uint8_t{0});
        continue;
      }
      round_row(row, own, width, steps, nothing, last);
    }
  });
  return {result, scales, zeros};
}

// As `scale_tokens` of int8_products.py.
void scale_tokens_(
    Tensor& rows, const Tensor& scales, const Tensor& zeros, const Tensor& sums, const std::optional<Tensor>& bias) {
  const int64_t count = rows.size(0), width = rows.size(1);
  const float *scale = scales.const_data_ptr<float>(), *zero = zeros.const_data_ptr<float>();
  const float *sum = sums.const_data_ptr<float>();
  const float* added = bias.has_value() ? bias->const_data_ptr<float>() : nullptr;
  float* output = rows.data_ptr<float>();
  at::parallel_for(0, count, std::max<int64_t>(1, 16384 / std::max<int64_t>(width, 1)), [&](int64_t begin, int64_t end) {
    for (int64_t number = begin; number < end; ++number) {
      float* own = output + number * width;
      const float times = scale[number], nothing = zero[number];
      if (added == nullptr)
        for (int64_t place = 0; place < width; ++place) own[place] = (own[place] - nothing * sum[place]) * times;
      else
        for (int64_t place = 0; place < width; ++place)
          own[place] = (own[place] - nothing * sum[place]) * times + added[place];
    }
  });
}

}  // namespace

TORCH_LIBRARY(fastbert_hf, library) {
  library.def("descend(Tensor tokens, Tensor weight, Tensor bias, int levels) -> (Tensor, Tensor)");
  library.def("sort_by_leaf(Tensor tokens, Tensor weight, Tensor bias, int depth) -> (Tensor, Tensor)");
  library.def("grouped_linear(Tensor tokens, Tensor order, Tensor counts, Tensor weight, Tensor bias) -> Tensor");
  library.def(
      "neuron_trees(Tensor tokens, Tensor weight, Tensor bias, Tensor table, Tensor? out_bias, int levels, "
      "int activation) -> Tensor");
  library.def("quantise_tokens(Tensor rows, int levels, float smallest, int result_rows) -> (Tensor, Tensor, Tensor)");
  library.def("scale_tokens_(Tensor(a!) rows, Tensor scales, Tensor zeros, Tensor sums, Tensor? bias) -> ()");
}

TORCH_LIBRARY_IMPL(fastbert_hf, CPU, library) {
  library.impl("descend", &descend);
  library.impl("sort_by_leaf", &sort_by_leaf);
  library.impl("grouped_linear", &grouped_linear);
  library.impl("neuron_trees", &neuron_trees);
  library.impl("quantise_tokens", &quantise_tokens);
  library.impl("scale_tokens_", &scale_tokens_);
}
