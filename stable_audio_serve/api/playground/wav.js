// Reads WAV files of 16 bits that are too long to decode at once or that are still growing.

import { pause } from "./api.js";
import { audioContext } from "./audio.js";

const LEAST_READ_BYTES = 1 << 18; // stored at once, unless the stream pauses
const QUIET_MS = 200;

// A WAV file that arrives in pieces. Its samples can be read while the rest is still missing.
export class GrowingWav {
  // `file` is the whole file if there is one, so that its samples are not stored twice.
  constructor(file = null) {
    this.file = file;
    this.format = null; // {rateHz, channels, frameBytes} once the header has arrived
    this.data = new Blob();
    this.isComplete = false;
    this.changed = new EventTarget(); // dispatches "change" when samples arrive and at the end
  }

  get numSamples() {
    return this.format ? Math.floor(this.data.size / this.format.frameBytes) : 0;
  }

  get duration() {
    return this.format ? this.numSamples / this.format.rateHz : 0;
  }

  // Reads a stream to its end or until `signal` is aborted, and calls `onSamples(channels, rateHz)` with what arrives.
  // After an error, another stream of the same file continues where the last one broke off.
  async follow(stream, { onSamples, signal }) {
    const skipped = this.format ? this.format.at + this.numSamples * this.format.frameBytes : 0;
    let rest = new Uint8Array();
    let at = 0; // of `rest` in the file
    const reader = stream.getReader();
    let reading = reader.read();
    for (;;) {
      const arrived = await (rest.length ? Promise.race([reading, pause(QUIET_MS)]) : reading);
      if (signal.aborted) return reader.cancel();
      if (!arrived && this.format) rest = this.take(rest, onSamples);
      if (!arrived) continue;
      const { done, value } = arrived;
      if (!done) reading = reader.read();
      if (value) {
        rest = joined(rest, value);
        const cut = Math.min(rest.length, Math.max(0, skipped - at));
        rest = rest.subarray(cut);
        at += cut;
        if (at < skipped) continue;
        if (!this.format) {
          this.format = readHeader(rest);
          if (!this.format) continue;
          rest = rest.subarray(this.format.at);
        }
      }
      if (this.format && (done || rest.length >= LEAST_READ_BYTES)) rest = this.take(rest, onSamples);
      if (done) break;
    }
    if (!this.format) throw new Error("The server sent no WAV file.");
    this.isComplete = true;
    this.changed.dispatchEvent(new Event("change"));
  }

  // Stores all complete samples. Returns the bytes after them.
  take(bytes, onSamples) {
    const { at, frameBytes, size } = this.format;
    const most = Math.min(bytes.length, size - this.data.size); // chunks may follow the samples
    const taken = bytes.slice(0, most - (most % frameBytes));
    if (taken.length) {
      this.data = this.file?.slice(at, at + this.data.size + taken.length) ?? new Blob([this.data, taken]);
      onSamples(samplesOf(taken, this.format), this.format.rateHz);
      this.changed.dispatchEvent(new Event("change"));
    }
    return bytes.subarray(taken.length);
  }

  // Returns up to `count` samples from `start` on as an AudioBuffer, null if there are none yet.
  async read(start, count) {
    const end = Math.min(start + count, this.numSamples);
    if (end <= start) return null;
    const { frameBytes, rateHz } = this.format;
    const bytes = new Uint8Array(await this.data.slice(start * frameBytes, end * frameBytes).arrayBuffer());
    const channels = samplesOf(bytes, this.format);
    const buffer = audioContext().createBuffer(channels.length, end - start, rateHz);
    channels.forEach((samples, index) => buffer.copyToChannel(samples, index));
    return buffer;
  }
}

function joined(first, second) {
  if (!first.length) return second;
  const both = new Uint8Array(first.length + second.length);
  both.set(first);
  both.set(second, first.length);
  return both;
}

// Returns the format, with `at` as the position of the samples and `size` as their bytes; null if bytes are missing.
function readHeader(bytes) {
  const view = new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength);
  const format = {};
  for (let at = 12; at + 8 <= bytes.length; ) {
    const name = String.fromCharCode(...bytes.subarray(at, at + 4));
    const size = view.getUint32(at + 4, true);
    if (name === "data") {
      const isUnknown = size === 0 || size >= 0xffffff00 - 1024; // the writer of a stream does not know its length
      return { ...format, at: at + 8, size: isUnknown ? Infinity : size };
    }
    if (at + 8 + size > bytes.length) return null;
    if (name === "fmt ") {
      format.channels = view.getUint16(at + 10, true);
      format.rateHz = view.getUint32(at + 12, true);
      format.frameBytes = view.getUint16(at + 20, true);
    }
    at += 8 + size + (size % 2);
  }
  return null;
}

// Returns the samples of each channel, float32 in -1..1.
function samplesOf(bytes, { channels, frameBytes }) {
  const view = new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength);
  return Array.from({ length: channels }, (_, channel) => {
    const samples = new Float32Array(bytes.length / frameBytes);
    for (let index = 0, at = 2 * channel; index < samples.length; index++, at += frameBytes) {
      samples[index] = view.getInt16(at, true) / 32768;
    }
    return samples;
  });
}
