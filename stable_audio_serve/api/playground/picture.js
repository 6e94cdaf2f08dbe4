// The picture of a sound: peaks for the waveform, and the levels of frequency bands for the spectrogram. It grows with
// the sound. A second takes about 12 kB and 10 ms; with the hop for long pieces, a quarter of that.

const PEAK_HOP = 128; // samples
const WINDOW = 2048; // samples of one column of the spectrogram
export const BANDS = 96;
const LOWEST_HZ = 40;
const [FLOOR_DB, TOP_DB] = [-100, -20]; // relative to a full-scale sine
const SLICE = 1 << 16; // samples analysed before other work runs

export const LONG_HOP = 2048;

export class Picture {
  // `hop` is the distance of the spectrogram's columns in samples.
  constructor(rateHz, hop = 512) {
    this.rateHz = rateHz;
    this.hop = hop;
    this.numSamples = 0;
    this.lows = new Growing(Float32Array);
    this.highs = new Growing(Float32Array);
    this.levels = new Growing(Uint8Array); // BANDS per column, lowest band first
    this.peak = { count: 0, low: 0, high: 0 };
    this.waiting = new Float32Array(WINDOW / 2); // the first window is centred on the first sample
    this.edges = bandEdges(rateHz);
  }

  // Adds the samples of a whole buffer, in slices. Stops once `isStale()`.
  async addBuffer(buffer, { isStale, onGrow }) {
    const channels = Array.from({ length: buffer.numberOfChannels }, (_, channel) => buffer.getChannelData(channel));
    for (let at = 0; at < buffer.length && !isStale(); at += SLICE) {
      this.add(channels.map((samples) => samples.subarray(at, at + SLICE)));
      onGrow();
      if (at + SLICE < buffer.length) await new Promise((resume) => setTimeout(resume));
    }
    this.close();
    onGrow();
  }

  add(channels) {
    const length = channels[0].length;
    const mono = new Float32Array(this.waiting.length + length);
    mono.set(this.waiting);
    for (let index = 0; index < length; index++) {
      let sum = 0;
      for (const samples of channels) sum += samples[index];
      const value = sum / channels.length;
      mono[this.waiting.length + index] = value;
      this.addPeak(value);
    }
    this.numSamples += length;
    this.addColumns(mono);
  }

  close() {
    this.addColumns(joinedWithSilence(this.waiting));
  }

  addPeak(value) {
    const { peak } = this;
    if (value < peak.low) peak.low = value;
    if (value > peak.high) peak.high = value;
    peak.count += 1;
    if (peak.count < PEAK_HOP) return;
    this.lows.push(peak.low);
    this.highs.push(peak.high);
    this.peak = { count: 0, low: 0, high: 0 };
  }

  addColumns(mono) {
    let at = 0;
    for (; at + WINDOW <= mono.length; at += this.hop) {
      const power = powers(mono.subarray(at, at + WINDOW));
      for (let band = 0; band < BANDS; band++) {
        let most = 0;
        for (let bin = this.edges[band]; bin < this.edges[band + 1] || bin === this.edges[band]; bin++) most = Math.max(most, power[bin]);
        const level = (10 * Math.log10(most + 1e-20) - FLOOR_DB) / (TOP_DB - FLOOR_DB);
        this.levels.push(255 * Math.max(0, Math.min(1, level)));
      }
    }
    this.waiting = mono.slice(at);
  }

  get duration() {
    return this.numSamples / this.rateHz;
  }

  // Returns the lowest and the highest sample between two times, seconds; null where nothing is known.
  extremes(from, to) {
    const first = Math.max(0, Math.floor((from * this.rateHz) / PEAK_HOP));
    const last = Math.min(this.lows.length - 1, Math.max(first, Math.ceil((to * this.rateHz) / PEAK_HOP) - 1));
    if (to < 0 || first > last) return null;
    let low = 0;
    let high = 0;
    for (let index = first; index <= last; index++) {
      low = Math.min(low, this.lows.data[index]);
      high = Math.max(high, this.highs.data[index]);
    }
    return [low, high];
  }

  // Returns the numbers of the first and the last column of the spectrogram between two times, seconds.
  columns(from, to) {
    const first = Math.max(0, Math.floor((from * this.rateHz) / this.hop));
    const last = Math.min(this.levels.length / BANDS - 1, Math.ceil((to * this.rateHz) / this.hop));
    return { first, last, seconds: this.hop / this.rateHz };
  }
}

// A typed array that grows.
class Growing {
  constructor(Type) {
    this.data = new Type(1 << 12);
    this.length = 0;
  }

  push(value) {
    if (this.length === this.data.length) {
      const larger = new this.data.constructor(2 * this.length);
      larger.set(this.data);
      this.data = larger;
    }
    this.data[this.length++] = value;
  }
}

function joinedWithSilence(samples) {
  const both = new Float32Array(samples.length + WINDOW / 2);
  both.set(samples);
  return both;
}

// Returns the first bin of each band, evenly spaced on the mel scale.
function bandEdges(rateHz) {
  const mel = (hz) => Math.log(1 + hz / 700);
  const [low, high] = [mel(LOWEST_HZ), mel(rateHz / 2)];
  const hz = (band) => 700 * (Math.exp(low + ((high - low) * band) / BANDS) - 1);
  return Array.from({ length: BANDS + 1 }, (_, band) => Math.min(WINDOW / 2 - 1, Math.round((hz(band) * WINDOW) / rateHz)));
}

const HANN = Float32Array.from({ length: WINDOW }, (_, index) => 0.5 - 0.5 * Math.cos((2 * Math.PI * index) / WINDOW));
const COS = Float32Array.from({ length: WINDOW / 2 }, (_, index) => Math.cos((2 * Math.PI * index) / WINDOW));
const SIN = Float32Array.from({ length: WINDOW / 2 }, (_, index) => -Math.sin((2 * Math.PI * index) / WINDOW));
const REVERSED = Uint16Array.from({ length: WINDOW }, (_, index) => {
  let reversed = 0;
  for (let bit = 1; bit < WINDOW; bit <<= 1) reversed = (reversed << 1) | (index & bit ? 1 : 0);
  return reversed;
});
const real = new Float32Array(WINDOW);
const imaginary = new Float32Array(WINDOW);
const power = new Float32Array(WINDOW / 2);

// Returns the power of each frequency bin of WINDOW samples; a full-scale sine has 1. The result is reused.
function powers(samples) {
  for (let index = 0; index < WINDOW; index++) {
    const from = REVERSED[index];
    real[index] = samples[from] * HANN[from];
    imaginary[index] = 0;
  }
  for (let half = 1; half < WINDOW; half *= 2) {
    const stride = WINDOW / 2 / half;
    for (let start = 0; start < WINDOW; start += 2 * half) {
      for (let index = 0; index < half; index++) {
        const a = start + index;
        const b = a + half;
        const cos = COS[index * stride];
        const sin = SIN[index * stride];
        const turnedReal = real[b] * cos - imaginary[b] * sin;
        const turnedImaginary = real[b] * sin + imaginary[b] * cos;
        real[b] = real[a] - turnedReal;
        imaginary[b] = imaginary[a] - turnedImaginary;
        real[a] += turnedReal;
        imaginary[a] += turnedImaginary;
      }
    }
  }
  const scale = (4 / WINDOW) ** 2;
  for (let bin = 0; bin < WINDOW / 2; bin++) power[bin] = scale * (real[bin] ** 2 + imaginary[bin] ** 2);
  return power;
}
