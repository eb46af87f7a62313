// One step of a Llama-like decoder: packed tokens of many sequences in, logits out.
//
// All between the products is done in fp32, a token at a time.
#pragma once

#include "attention.hpp"
#include "products.hpp"

struct Layer {
    Weight q, k, v, o, gate, up, down;
    Numbers norm_attention, norm_mlp, norm_q, norm_k;  // norms of single heads: Qwen3; no data: none
    Pages pages;
    int64 window;
};

struct Decoder {
    int64 num_layers, hidden, intermediate, heads, kv_heads, head_dim;
    float eps, scale;
    const Layer* layers;
    Numbers embedding, norm;
    Weight head;
};

struct Step {
    int64 tokens;
    const int64 *ids, *slots;  // [tokens]: vocabulary; where keys and values go
    const float *cos, *sin;    // [tokens, head_dim]
    Sequences sequences;
    int64 num_logits;
    const int64* logit_rows;   // [num_logits] tokens whose logits are wanted
    float *logits, *states;    // [num_logits, vocabulary]; [tokens, hidden] final states, or null
};

// out[i] = x[i] / sqrt(mean(x^2) + eps) * weight[i]
static void rms_norm(const float* x, const float* weight, float eps, int64 width, float* out) {
    f32x8 squares{};
    int64 i = 0;
    for (; i + 8 <= width; i += 8) squares += load<f32x8>(x + i) * load<f32x8>(x + i);
    float total = sum(squares);
    for (; i < width; ++i) total += x[i] * x[i];
    const float factor = 1 / std::sqrt(total / width + eps);
    for (i = 0; i < width; ++i) out[i] = x[i] * factor * weight[i];
}

// Rotary embedding in place: pairs (i, i + dim / 2) turn by their angle.
static void rotate(float* x, const float* cos, const float* sin, int64 dim) {
    float *__restrict first = x, *__restrict second = x + dim / 2;
    for (int64 i = 0; i < dim / 2; ++i) {
        const float a = first[i], b = second[i];
        first[i] = a * cos[i] - b * sin[i];
        second[i] = b * cos[i + dim / 2] + a * sin[i + dim / 2];
    }
}

// gate[i] = silu(gate[i]) * up[i], with silu(x) = x / (1 + e^-x)
static void silu_times(float* gate, const float* up, int64 width) {
    int64 i = 0;
    for (; i + 8 <= width; i += 8) {
        const f32x8 x = load<f32x8>(gate + i), e = exp_negative(x < 0.0f ? x : -x);
        const f32x8 out = x * (x < 0.0f ? e : all(1)) / (1 + e) * load<f32x8>(up + i);
        std::memcpy(gate + i, &out, sizeof out);
    }
    for (; i < width; ++i) gate[i] = gate[i] / (1 + std::exp(-gate[i])) * up[i];
}

// What a step needs besides its input; kept from step to step, so that no page of memory is new.
struct Workspace {
    std::vector<float> x, normed, qkv, attended, gate, up, weights;
    Activations activations;
};

static void decode(const Decoder& model, const Step& step, int threads) {
    static thread_local Workspace space;
    const int64 hidden = model.hidden, dim = model.head_dim, width = (model.heads + 2 * model.kv_heads) * dim;
    const int64 q_width = model.heads * dim, rotated = model.heads + model.kv_heads;
    auto grow = [](std::vector<float>& v, int64 size) { if ((int64)v.size() < size) v.resize(size); };
    grow(space.x, step.tokens * hidden);
    grow(space.normed, step.tokens * hidden);
    grow(space.qkv, step.tokens * width);
    grow(space.attended, step.tokens * q_width);
    grow(space.gate, step.tokens * model.intermediate);
    grow(space.up, step.tokens * model.intermediate);
    grow(space.weights, std::max(hidden, dim));
    float *x = space.x.data(), *normed = space.normed.data(), *qkv = space.qkv.data(), *attended = space.attended.data();
    float *gate = space.gate.data(), *up = space.up.data(), *weights = space.weights.data();
    const std::vector<Span> spans = spans_of(step.sequences, model.heads / model.kv_heads);

    const int helpers = step.tokens > 16 ? threads : 1;  // few tokens are sooner done alone

    auto for_tokens = [&](auto body) { Team::each(step.tokens, helpers, body); };
    auto normalize = [&](const Numbers& weight, const float* from, float* to, int64 tokens) {
        weight.read(0, hidden, weights);
        Team::each(tokens, helpers, [&](int64 token) {
            rms_norm(from + token * hidden, weights, model.eps, hidden, to + token * hidden);
        });
    };
    const bool rounded = model.embedding.kind == BFLOAT16;  // a model of this type rounds its numbers itself
    auto multiply = [&](const Weight& w, const float* from, int64 tokens, float* to, int64 stride) {
        product(w, space.activations, from, tokens, to, stride, threads, rounded);
    };
    auto multiply_as_before = [&](const Weight& w, const Weight& before, const float* from, float* to, int64 stride) {
        multiply(w, alike(w, before) ? nullptr : from, step.tokens, to, stride);  // arranged once, for q, k and v
    };
    auto add_product = [&](const Weight& w, const float* from) {  // x += from @ w.T
        multiply(w, from, step.tokens, normed, hidden);
        for_tokens([&](int64 token) {
            for (int64 i = token * hidden; i < (token + 1) * hidden; ++i) x[i] += normed[i];
        });
    };
    auto turn = [&](const float* norm, int64 token, int64 first, int64 count) {
        for (int64 head = first; head < first + count; ++head) {
            float* at = qkv + token * width + head * dim;
            if (norm) rms_norm(at, norm, model.eps, dim, at);
            rotate(at, step.cos + token * dim, step.sin + token * dim, dim);
        }
    };
    std::vector<float> norm_q(dim), norm_k(dim);

    for_tokens([&](int64 token) { model.embedding.read(step.ids[token] * hidden, hidden, x + token * hidden); });
    for (int64 i = 0; i < model.num_layers; ++i) {
        const Layer& layer = model.layers[i];
        normalize(layer.norm_attention, x, normed, step.tokens);
        multiply(layer.q, normed, step.tokens, qkv, width);
        multiply_as_before(layer.k, layer.q, normed, qkv + q_width, width);
        multiply_as_before(layer.v, layer.k, normed, qkv + rotated * dim, width);
        if (layer.norm_q) layer.norm_q.read(0, dim, norm_q.data()), layer.norm_k.read(0, dim, norm_k.data());
        for_tokens([&](int64 token) {
            turn(layer.norm_q ? norm_q.data() : nullptr, token, 0, model.heads);
            turn(layer.norm_q ? norm_k.data() : nullptr, token, model.heads, model.kv_heads);
        });
        const Scoring scoring{model.scale, 0, layer.window, nullptr};
        in_type_of(layer.pages, [&](auto number) {
            using T = decltype(number);
            for_tokens([&](int64 token) {
                write_pages<T>(layer.pages, qkv + q_width, qkv + rotated * dim, width, step.slots, token);
            });
            attend<T>(layer.pages, step.sequences, spans, scoring, model.heads, qkv, width, attended, q_width, threads);
        });
        add_product(layer.o, attended);
        normalize(layer.norm_mlp, x, normed, step.tokens);
        multiply(layer.gate, normed, step.tokens, gate, model.intermediate);
        multiply_as_before(layer.up, layer.gate, normed, up, model.intermediate);
        for_tokens([&](int64 token) {
            silu_times(gate + token * model.intermediate, up + token * model.intermediate, model.intermediate);
        });
        add_product(layer.down, gate);
    }
    if (step.states) normalize(model.norm, x, step.states, step.tokens);
    for (int64 i = 0; i < step.num_logits; ++i) std::copy_n(x + step.logit_rows[i] * hidden, hidden, normed + i * hidden);
    normalize(model.norm, normed, normed, step.num_logits);
    multiply(model.head, normed, step.num_logits, step.logits, model.head.rows);
}
