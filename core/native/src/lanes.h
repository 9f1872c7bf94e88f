// The kernels beside the matrix products: norms, short convolutions, scans, quantizing. One set of functions a path (lanes_*.cpp),
// each of which does a part of the work: of the rows, of the channels, of the heads.
#pragma once

#include "lmx_native.h"

namespace lmx {

// Channels that a part of a scan or a convolution begins and ends at, so that threads share no cache line.
constexpr int64_t CHANNEL_GRAIN = 64;
constexpr int64_t RECURRENCE_TILE = 128;
// As in core/native/scan.py: more is left to torch.
constexpr int64_t MAX_STATES = 64, MAX_KERNEL = 8;

// y = x / sqrt(mean(x^2) + eps) * weight for each row; `x` is first rounded to the dtype of y, which weight has too.
// weight: null for none. offset: the weight is stored minus one, and nothing is rounded before the product.
struct Norm {
    const void* x;
    const void* weight;
    void* y;
    int64_t x_stride, y_stride, width;
    Dtype x_dtype;
    float eps;
    int64_t offset;
};

// sum = left + right for each row of `width`, in float, rounded once; a right_stride of 0 adds one row to all. Both are of
// the sum's dtype, or of a narrower one; not a float one on the right of a narrower one.
struct Add {
    const void *left, *right;
    void* sum;
    int64_t right_stride, width;
    Dtype left_dtype, right_dtype, sum_dtype;
};

// y_t = bias + sum_j weight[j] x_{t - kernel + 1 + j}, silu of it if asked for; bias: or null.
// x and y [batch, length, channels], weight [channels, kernel], state [batch, channels, kernel - 1], all of one dtype.
// Here and below the state is read from one place and written to another, which may be the same.
struct Conv {
    const void *x, *weight, *bias, *state;
    void *new_state, *y;
    int64_t batch, length, channels, kernel, x_stride;
    int64_t silu;
};

// delta = softplus(raw + bias); h = exp(delta A) h + delta x B; y = (h . C + D x) silu(gate).
// raw, x, gate, y [batch, length, inner]; B, C [batch, length, states]; bias, D [inner]: of one dtype.
// A [inner, states] and state [batch, inner, states] in float. lengths: real steps of each row, or null; y is 0 behind.
struct Scan {
    const void *raw, *bias, *x, *gate, *B, *C, *D;
    const float *A, *state;
    float* new_state;
    void* y;
    const int64_t* lengths;
    int64_t batch, length, inner, states;
    int64_t raw_stride, x_stride, gate_stride, b_stride;
};

// h = a h + sqrt(1 - a^2) sigmoid(input) x with a = 2^(rate sigmoid(recurrent)), a = 0 where a text begins; y = h gate.
// x, gate, y [batch, length, heads * width]; input, recurrent [heads, batch * length, width]: of one dtype; gate or null.
// rate [heads * width], state [batch, heads * width] in float; reset [batch, length] with that stride; lengths: as above.
// Where weights [heads, width, width] and biases [heads, width] stand, the gates are x's products with them.
struct Recurrence {
    const void *x, *input, *recurrent, *gate;
    const void *input_weight, *input_bias, *recurrent_weight, *recurrent_bias;
    const float *rate, *state;
    const uint8_t* reset;
    float* new_state;
    void* y;
    const int64_t* lengths;
    int64_t batch, length, heads, width;
    int64_t x_stride, gate_stride, reset_stride;
};

// out = stream + (sums + bias), as separate operations round: the sums and what the bias makes of them to bfloat16, the
// whole to the dtype of out. bias, stream: or null; a stream is bfloat16, or float where out is.
struct Finish {
    const float* sums;
    const bf16* bias;
    const void* stream;
    void* out;
    int64_t count;
    Dtype stream_dtype, out_dtype;
};

// out = activation(gate) * up, in bfloat16; activation: a number of prepare.h, but the error function's gelu.
struct Gate {
    const bf16 *gate, *up;
    bf16* out;
    int64_t count;
    int activation;
};

constexpr int RANKS = 16;
// As in quant/four_bit.py.
constexpr float SMALLEST_ABSMAX = 1e-38f;

// x, in blocks of block_size, to the ranks of x / absmax among 16 sorted values, two a byte, and their absmax.
// thresholds [15]: halfway between the values; codes [256]: for a byte of two ranks that of two codes; null: the same.
struct FourBit {
    const void* x;
    int64_t block_size;
    const float* thresholds;
    const uint8_t* codes;
    uint8_t* packed;
    float* absmax;
};

// x [rows, columns], rounded to float16, to whole numbers between -127 and 127 times absmax / 127 [rows].
struct Int8 {
    const void* x;
    int64_t columns;
    uint8_t* weight;
    float* absmax;
};

struct Lanes {
    void (*finish)(const Finish&);
    void (*gate)(const Gate&);
    void (*soft_cap)(bf16* x, int64_t count, float cap);
    void (*add)(const Add&, int64_t first, int64_t last);
    void (*norm)(const Norm&, Dtype, int64_t first, int64_t last);
    void (*conv)(const Conv&, Dtype, int64_t first, int64_t last);
    void (*scan)(const Scan&, Dtype, int64_t first, int64_t last);
    void (*recurrence)(const Recurrence&, Dtype, int64_t first, int64_t last);
    void (*four_bit)(const FourBit&, Dtype, int64_t first, int64_t last);
    void (*int8)(const Int8&, Dtype, int64_t first, int64_t last);
    double (*squares)(const float* values, const void* x, Dtype, int64_t count);
    float (*largest)(const void* x, Dtype, int64_t count);
    int64_t (*place)(const void* x, Dtype, int64_t count, float value);
    float (*exponentials)(const void* x, Dtype, int64_t count, float largest);
};

// Of the path in use.
const Lanes& lanes();

}  // namespace lmx
