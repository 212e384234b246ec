// models.js: the forward passes of the first five scripts of the course, in plain JavaScript.
//
// Each function does what the class of the same name does in the scripts, for one window of text
// (so there is no batch dimension B). T is the number of characters in the window, and V the size
// of the vocabulary. As in v7b_kv_cache.py, characters that were there at the last call aren't
// computed again: no position sees later ones, so nothing about them changes. N is the number of
// characters that are new.
"use strict";

// A float32 matrix. values has its rows, one after another.
class Matrix {
  constructor(rows, columns, values = new Float32Array(rows * columns)) {
    this.rows = rows;
    this.columns = columns;
    this.values = values;
  }

  // Row i as a view: writing to it changes the matrix.
  row(i) {
    return this.values.subarray(i * this.columns, (i + 1) * this.columns);
  }

  // The first n rows, with the rows of another matrix below them.
  firstRowsAnd(n, other) {
    const joined = new Matrix(n + other.rows, other.columns);
    joined.values.set(this.values.subarray(0, n * this.columns));
    joined.values.set(other.values, n * other.columns);
    return joined;
  }
}

// ---- Layers

// nn.Linear: x @ weight^T + bias. weight: (n_out, n_in). (N, n_in) -> (N, n_out).
function linear(x, { weight, bias }) {
  const n_in = weight.columns;
  const n_out = weight.rows;
  const out = new Matrix(x.rows, n_out); // (N, n_out)
  const a = x.values;
  const b = weight.values;
  for (let t = 0; t < x.rows; t++) {
    for (let o = 0; o < n_out; o++) {
      let sum = bias ? bias[o] : 0;
      for (let i = 0; i < n_in; i++) {
        sum += a[t * n_in + i] * b[o * n_in + i];
      }
      out.values[t * n_out + o] = sum;
    }
  }
  return out;
}

// nn.Embedding: the rows of weight that idx names. (N) -> (N, n_embd).
function embedding(idx, { weight }) {
  const out = new Matrix(idx.length, weight.columns); // (N, n_embd)
  idx.forEach((token, t) => out.row(t).set(weight.row(token)));
  return out;
}

// The sum of two matrices of the same shape.
function add(a, b) {
  return new Matrix(a.rows, a.columns, a.values.map((value, i) => value + b.values[i]));
}

// Negative numbers become 0.
function relu(x) {
  return new Matrix(x.rows, x.columns, x.values.map((value) => Math.max(value, 0)));
}

// nn.LayerNorm: each row gets mean 0 and variance 1, then a scale and a shift that are learned.
function layerNorm(x, { weight, bias }) {
  const n_embd = x.columns;
  const out = new Matrix(x.rows, n_embd); // (N, n_embd)
  for (let t = 0; t < x.rows; t++) {
    const row = x.row(t); // (n_embd)
    let mean = 0;
    let variance = 0;
    for (const value of row) mean += value / n_embd;
    for (const value of row) variance += (value - mean) ** 2 / n_embd;
    const deviation = Math.sqrt(variance + 1e-5); // PyTorch's eps keeps it above 0
    for (let i = 0; i < n_embd; i++) {
      out.values[t * n_embd + i] = ((row[i] - mean) / deviation) * weight[i] + bias[i];
    }
  }
  return out;
}

// Probabilities from scores, an array of any length; logits / temperature are scores, too.
function softmax(scores, temperature = 1) {
  // Subtracting the maximum changes nothing, but exp can't overflow.
  const maximum = Math.max(...scores);
  const exps = scores.map((score) => Math.exp((score - maximum) / temperature));
  const total = exps.reduce((sum, value) => sum + value, 0);
  return exps.map((value) => value / total);
}

// ---- Attention

// What a model keeps from one call to the next: the token ids, their logits, and for each head the
// keys, the values and the attention weights.
class Cache {
  constructor() {
    this.idx = [];
    this.start = 0; // how many of the characters are known, so the first new position
    this.logits = new Matrix(0, 0); // (T, V)
    this.heads = new Map(); // a head's parameters -> { key, value, weights }
  }

  // What was kept for a head; nothing at first.
  of(parameters) {
    const empty = new Matrix(0, 0);
    return this.heads.get(parameters) ?? { key: empty, value: empty, weights: [] };
  }
}

// Head: one head of causal self-attention. (N, n_embd) -> (N, head_size).
function head(x, parameters, cache) {
  const { start } = cache;
  const kept = cache.of(parameters);
  const query = linear(x, parameters.query); // (N, head_size)
  const key = kept.key.firstRowsAnd(start, linear(x, parameters.key)); // (T, head_size)
  const value = kept.value.firstRowsAnd(start, linear(x, parameters.value)); // (T, head_size)
  const weights = kept.weights.slice(0, start); // weights[i][j]: how much i attends to j
  const head_size = query.columns;
  const out = new Matrix(x.rows, head_size); // (N, head_size)
  for (let n = 0; n < x.rows; n++) {
    const i = start + n; // the position
    // Position i has no scores for the positions after it. That is the mask.
    const scores = new Float32Array(i + 1);
    for (let j = 0; j <= i; j++) {
      let sum = 0;
      for (let c = 0; c < head_size; c++) {
        sum += query.values[n * head_size + c] * key.values[j * head_size + c];
      }
      scores[j] = sum / Math.sqrt(head_size);
    }
    weights.push(softmax(scores)); // (i + 1)
    // The output is the average of the values of positions 0 to i with these weights.
    for (let j = 0; j <= i; j++) {
      for (let c = 0; c < head_size; c++) {
        out.values[n * head_size + c] += weights[i][j] * value.values[j * head_size + c];
      }
    }
  }
  cache.heads.set(parameters, { key, value, weights });
  return out;
}

// MultiHeadAttention: the outputs of the heads side by side, then a projection.
// (N, n_embd) -> (N, n_embd).
function multiHeadAttention(x, parameters, cache) {
  const n_embd = x.columns;
  const joined = new Matrix(x.rows, n_embd); // (N, n_embd)
  let start = 0; // the first column of a head
  for (const headParameters of parameters.heads) {
    const out = head(x, headParameters, cache); // (N, head_size)
    for (let t = 0; t < x.rows; t++) joined.row(t).set(out.row(t), start);
    start += out.columns;
  }
  return linear(joined, parameters.projection);
}

// FeedForward: two linear layers with a ReLU between them. (N, n_embd) -> (N, n_embd).
function feedForward(x, parameters) {
  const hidden = relu(linear(x, parameters.expansion)); // (N, 4 * n_embd)
  return linear(hidden, parameters.projection);
}

// Block: attention and a feed-forward network. Each adds to x instead of replacing it.
// (N, n_embd) -> (N, n_embd).
function block(x, parameters, cache) {
  x = add(x, multiHeadAttention(layerNorm(x, parameters.norm_1), parameters.attention, cache));
  return add(x, feedForward(layerNorm(x, parameters.norm_2), parameters.feed_forward));
}

// ---- The models: the forward passes, from new token ids, (N), to their logits, (N, V)

// The embeddings of the tokens plus those of their positions. (N) -> (N, n_embd).
function embed(model, idx, cache) {
  const positions = idx.map((_, n) => cache.start + n); // start, ..., T - 1
  return add(embedding(idx, model.token_embedding), embedding(positions, model.position_embedding));
}

const forward = {
  bigram(model, idx) {
    return embedding(idx, model.token_embedding); // (N, V): the table has the logits themselves
  },

  v2_single_head(model, idx, cache) {
    let x = embed(model, idx, cache); // (N, n_embd)
    x = head(x, model.attention, cache); // (N, n_embd)
    return linear(x, model.lm_head); // (N, V)
  },

  v3_multi_head(model, idx, cache) {
    let x = embed(model, idx, cache); // (N, n_embd)
    x = multiHeadAttention(x, model.attention, cache); // (N, n_embd)
    return linear(x, model.lm_head); // (N, V)
  },

  v4_feedforward(model, idx, cache) {
    let x = embed(model, idx, cache); // (N, n_embd)
    x = multiHeadAttention(x, model.attention, cache); // (N, n_embd)
    x = feedForward(x, model.feed_forward); // (N, n_embd)
    return linear(x, model.lm_head); // (N, V)
  },

  v5_gpt(model, idx, cache) {
    let x = embed(model, idx, cache); // (N, n_embd)
    for (const parameters of model.blocks) {
      x = block(x, parameters, cache); // (N, n_embd)
    }
    x = layerNorm(x, model.norm_f); // (N, n_embd)
    return linear(x, model.lm_head); // (N, V)
  },
};

// The logits of a model, (T, V), at each position of a window of token ids, (T). Positions before
// the first change are known; the last one is always computed.
function computeLogits(name, model, idx, cache) {
  let start = 0;
  while (start < idx.length - 1 && idx[start] === cache.idx[start]) start += 1;
  cache.idx = idx;
  cache.start = start;
  const logits = forward[name](model, idx.slice(start), cache); // (N, V)
  cache.logits = cache.logits.firstRowsAnd(start, logits); // (T, V)
  return cache.logits;
}

// ---- The weights

// The 16 bits of a float16 (1 for the sign, 5 for the exponent, 10 for the fraction) as a number.
function fromFloat16(bits) {
  const sign = bits & 0x8000 ? -1 : 1;
  const exponent = (bits >> 10) & 0x1f;
  const fraction = (bits & 0x3ff) / 1024;
  if (exponent === 0) return sign * fraction * 2 ** -14; // the numbers closest to 0
  return sign * (1 + fraction) * 2 ** (exponent - 15);
}

// A parameter from its shape and its float16 values in base64: a Matrix, or a Float32Array if it
// has one dimension.
function unpack({ shape, float16 }) {
  const bytes = Uint8Array.from(atob(float16), (character) => character.charCodeAt(0));
  const view = new DataView(bytes.buffer);
  const values = new Float32Array(bytes.length / 2);
  for (let i = 0; i < values.length; i++) {
    values[i] = fromFloat16(view.getUint16(2 * i, true)); // true: little-endian
  }
  return shape.length === 2 ? new Matrix(shape[0], shape[1], values) : values;
}

// A model from its packed parameters, which have PyTorch's names. "blocks.0.norm_1.weight" becomes
// model.blocks[0].norm_1.weight.
function loadModel(packed) {
  const model = {};
  for (const [name, parameter] of Object.entries(packed)) {
    const path = name.split(".");
    const last = path.pop();
    let parent = model;
    path.forEach((part, depth) => {
      const next = path[depth + 1];
      if (parent[part] === undefined) parent[part] = /^\d+$/.test(next) ? [] : {};
      parent = parent[part];
    });
    parent[last] = unpack(parameter);
  }
  return model;
}
