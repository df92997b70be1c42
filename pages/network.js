"use strict";
// A trained generator, encoder or decoder, run in a Web Worker, so that the page never waits for it.
// latent_space_interpolation.py and latent_space_vae.py write the layers and their weights into their pages, next to
// this file.
//
// An image is {height, width, channels, values}. The values are a Float32Array, row after row, the channels
// of a pixel side by side: channel c of the pixel in row y and column x is values[(y * width + x) * channels + c].
// A vector is an image of a single pixel. Shapes below are (height, width, channels). There is no batch.
//
// A weight is stored with the outputs last: (inputs, outputs) of a linear layer, (kernel, kernel, inputs, outputs)
// of a convolution. All of them come down to the same sum: each channel of an input pixel is multiplied by the row
// of weights that lead from it to the channels of an output pixel.

function makeImage(height, width, channels, values = new Float32Array(height * width * channels)) {
  return {height, width, channels, values};
}

// An image of which each pixel is the bias, one value a channel: the sum of a layer begins with it.
function fill(height, width, bias) {
  const out = makeImage(height, width, bias.length);
  for (let start = 0; start < out.values.length; start += bias.length) out.values.set(bias, start);
  return out;
}

// Room for the inputs of a pixel that are not 0, and for where their rows begin in the weight.
function makeLive(channels) {
  return {inputs: new Float32Array(channels + 3), rows: new Int32Array(channels + 3)};
}

// Adds to output pixel `at` what input pixel `from` contributes through one place of the kernel. A ReLU leaves about
// half of the inputs at 0, and these are passed over. The others are taken four at a time.
function addPixel(out, at, x, from, weight, place, live) {
  let count = 0;
  for (let i = 0; i < x.channels; i++) {
    const input = x.values[from * x.channels + i];
    if (input === 0) continue;
    live.inputs[count] = input;
    live.rows[count] = (place * x.channels + i) * out.channels;
    count += 1;
  }
  live.inputs.fill(0, count, count + 3);  // so that the last four are complete
  for (let k = 0; k < count; k += 4) addFour(out.values, at * out.channels, out.channels, weight, live, k);
}

// Each output is read and written once for four inputs: 1.7 times as fast as one at a time.
function addFour(values, start, channels, weight, {inputs, rows}, k) {
  const a = inputs[k], b = inputs[k + 1], c = inputs[k + 2], d = inputs[k + 3];
  const rowA = rows[k], rowB = rows[k + 1], rowC = rows[k + 2], rowD = rows[k + 3];
  for (let o = 0; o < channels; o++)
    values[start + o] += a * weight[rowA + o] + b * weight[rowB + o] + c * weight[rowC + o] + d * weight[rowD + o];
}

function linear(x, {weight, bias}) {  // (1, 1, inputs) -> (1, 1, outputs)
  const out = fill(1, 1, bias);
  addPixel(out, 0, x, 0, weight, 0, makeLive(x.channels));
  return out;
}

// Calls visit(pixel of the small image, pixel of the large one, place in the kernel) for all that a convolution joins:
// row y of the small image and row y stride + ky - padding of the large one, and columns likewise. The places are
// the outer loop, since the weights of one are few enough to stay in the processor's cache while all pixels use them.
function join(small, large, {kernel, stride, padding}, visit) {
  for (let place = 0; place < kernel * kernel; place++) {
    const [down, right] = [Math.floor(place / kernel) - padding, place % kernel - padding];
    for (let y = 0; y < small.height; y++)
      for (let x = 0; x < small.width; x++) {
        const [row, column] = [y * stride + down, x * stride + right];
        const inside = row >= 0 && row < large.height && column >= 0 && column < large.width;
        if (inside) visit(y * small.width + x, row * large.width + column, place);
      }
  }
}

// (H, W, inputs) -> (H', W', outputs) with H' = floor((H + 2 padding - kernel) / stride) + 1: an output pixel gathers.
function conv(x, layer) {
  const size = side => Math.floor((side + 2 * layer.padding - layer.kernel) / layer.stride) + 1;
  const out = fill(size(x.height), size(x.width), layer.bias), live = makeLive(x.channels);
  join(out, x, layer, (at, from, place) => addPixel(out, at, x, from, layer.weight, place, live));
  return out;
}

// (H, W, inputs) -> (H', W', outputs) with H' = (H - 1) stride - 2 padding + kernel, the reverse: an input pixel is
// spread over the output.
function convTranspose(x, layer) {
  const size = side => (side - 1) * layer.stride - 2 * layer.padding + layer.kernel;
  const out = fill(size(x.height), size(x.width), layer.bias), live = makeLive(x.channels);
  join(x, out, layer, (from, at, place) => addPixel(out, at, x, from, layer.weight, place, live));
  return out;
}

// Batch norm of a trained network: a factor and a shift for each channel. The shape stays.
function scale(x, {weight, bias}) {
  const out = makeImage(x.height, x.width, x.channels);
  for (let start = 0; start < out.values.length; start += x.channels)
    for (let c = 0; c < x.channels; c++) out.values[start + c] = x.values[start + c] * weight[c] + bias[c];
  return out;
}

// A function of each value; the shape stays.
const each = change => (x, layer) => {
  const out = makeImage(x.height, x.width, x.channels);
  for (let i = 0; i < out.values.length; i++) out.values[i] = change(x.values[i], layer);
  return out;
};
const relu = each(value => value > 0 ? value : 0);
const leakyRelu = each((value, {slope}) => value > 0 ? value : slope * value);
const tanh = each(Math.tanh);
const sigmoid = each(value => 1 / (1 + Math.exp(-value)));
const brightness = each((value, {black}) => Math.min(1, Math.max(0, (value - black) / (1 - black))));  // white is 1

function upsample(x, {factor}) {  // (H, W, C) -> (factor H, factor W, C), each pixel repeated
  const out = makeImage(factor * x.height, factor * x.width, x.channels);
  for (let to = 0; to < out.height * out.width; to++) {
    const [row, column] = [Math.floor(to / out.width / factor), Math.floor(to % out.width / factor)];
    const from = (row * x.width + column) * x.channels;
    out.values.set(x.values.subarray(from, from + x.channels), to * x.channels);
  }
  return out;
}

function averagePool(x, {size}) {  // (H, W, C) -> (floor(H / size), floor(W / size), C), means of squares
  const out = makeImage(Math.floor(x.height / size), Math.floor(x.width / size), x.channels);
  for (let y = 0; y < out.height * size; y++)
    for (let column = 0; column < out.width * size; column++)
      for (let c = 0; c < x.channels; c++) {
        const to = (Math.floor(y / size) * out.width + Math.floor(column / size)) * x.channels + c;
        out.values[to] += x.values[(y * x.width + column) * x.channels + c] / size ** 2;
      }
  return out;
}

// torch keeps an image channel after channel, so that a vector holds all pixels of the first channel first.
function unflatten(x, {channels, height, width}) {  // (1, 1, C H W) -> (H, W, C)
  const out = makeImage(height, width, channels);
  const pixels = height * width;
  return {...out, values: out.values.map((_, i) => x.values[i % channels * pixels + Math.floor(i / channels)])};
}
function flatten(x) {  // (H, W, C) -> (1, 1, C H W)
  const pixels = x.height * x.width;
  const values = x.values.map((_, i) => x.values[i % pixels * x.channels + Math.floor(i / pixels)]);
  return makeImage(1, 1, values.length, values);
}

function residual(x, {branches}) {  // the sum of what two lists of layers make of x; an empty list keeps it
  const [sum, other] = branches.map(layers => run(layers, x));
  const values = sum.values.slice();
  for (let i = 0; i < values.length; i++) values[i] += other.values[i];
  return {...sum, values};
}

const LAYERS = {linear, conv, convTranspose, scale, relu, leakyRelu, tanh, sigmoid, brightness, upsample, averagePool,
                unflatten, flatten, residual};

function run(layers, input) {
  let x = input;
  for (const layer of layers) x = LAYERS[layer.type](x, layer);
  return x;
}

// ---- weights from bytes

// A tensor lies in the bytes from `start` on, as `length` numbers of its kind. Whole numbers are stored as all their
// low bytes and then all their high ones, and each output has a factor.
function unpackTensor({kind, start, length, scales}, bytes) {
  if (kind === "float32") return new Float32Array(bytes.slice(start, start + 4 * length).buffer);
  const low = bytes.subarray(start, start + length), high = new Int8Array(bytes.buffer, start + length, length);
  const factors = unpackTensor(scales, bytes);
  return Float32Array.from(low, (value, i) => (value + 256 * high[i]) * factors[i % factors.length]);
}

function unpack(layers, bytes) {
  return layers.map(layer => {
    const full = {...layer};
    if (layer.weight) full.weight = unpackTensor(layer.weight, bytes);
    if (layer.bias) full.bias = unpackTensor(layer.bias, bytes);
    if (layer.branches) full.branches = layer.branches.map(branch => unpack(branch, bytes));
    return full;
  });
}

// The bytes that gzip has packed: a promise.
async function unzip(packed) {
  if (typeof DecompressionStream === "undefined")
    throw new Error("the browser is too old; Chrome 80, Firefox 113 and Safari 16.4 can do it");
  const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("gzip"));
  return new Uint8Array(await new Response(stream).arrayBuffer());
}

// ---- the worker: the layers come first, then the inputs, each with a number that goes back with its image.
// shape is [height, width, channels] of an input; without it the input is a vector.
let ready;  // a promise of the layers
async function answer({layers, packed, number, input, shape}) {
  if (layers) {
    ready = unzip(packed).then(bytes => unpack(layers, bytes));
    await ready;
  } else {
    const {values} = run(await ready, makeImage(...shape ?? [1, 1, input.length], input));
    postMessage({number, values});
  }
}
// an error goes on to the page, which says it
onmessage = ({data}) => answer(data).catch(error => setTimeout(() => { throw error; }));
