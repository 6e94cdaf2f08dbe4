// Audio in the browser: decoding, WAV files, gapless playback of one clip or of two at equal loudness. No page code.

let context = null;

export function audioContext() {
  context ??= new AudioContext();
  return context;
}

// Decodes at the file's own rate. Needs no audio device and no user gesture.
export async function decode(blob, rateHz) {
  const offline = new OfflineAudioContext({ numberOfChannels: 2, length: 1, sampleRate: rateHz });
  return offline.decodeAudioData(await blob.arrayBuffer());
}

// Returns the clip with silence before and after it, in seconds.
export function padded(buffer, beforeS, afterS) {
  const before = Math.round(beforeS * buffer.sampleRate);
  const length = before + buffer.length + Math.round(afterS * buffer.sampleRate);
  const result = new AudioBuffer({ numberOfChannels: buffer.numberOfChannels, length, sampleRate: buffer.sampleRate });
  for (let channel = 0; channel < buffer.numberOfChannels; channel++) {
    result.getChannelData(channel).set(buffer.getChannelData(channel), before);
  }
  return result;
}

// Returns a 16-bit WAV file. Chromium decodes with the same two scales, so that samples survive a round trip.
export function wavBlob(buffer) {
  const { numberOfChannels: channels, sampleRate, length } = buffer;
  const bytes = new DataView(new ArrayBuffer(44 + length * channels * 2));
  const text = (at, value) => [...value].forEach((char, index) => bytes.setUint8(at + index, char.charCodeAt(0)));
  text(0, "RIFF");
  bytes.setUint32(4, bytes.byteLength - 8, true);
  text(8, "WAVEfmt ");
  bytes.setUint32(16, 16, true);
  bytes.setUint16(20, 1, true);
  bytes.setUint16(22, channels, true);
  bytes.setUint32(24, sampleRate, true);
  bytes.setUint32(28, sampleRate * channels * 2, true);
  bytes.setUint16(32, channels * 2, true);
  bytes.setUint16(34, 16, true);
  text(36, "data");
  bytes.setUint32(40, length * channels * 2, true);
  const data = Array.from({ length: channels }, (_, channel) => buffer.getChannelData(channel));
  for (let frame = 0, at = 44; frame < length; frame++) {
    for (const samples of data) {
      const value = Math.max(-1, Math.min(1, samples[frame]));
      bytes.setInt16(at, Math.round(value * (value < 0 ? 32768 : 32767)), true);
      at += 2;
    }
  }
  return new Blob([bytes.buffer], { type: "audio/wav" });
}

export async function sha256(bytes) {
  const digest = await crypto.subtle.digest("SHA-256", bytes);
  return [...new Uint8Array(digest)].map((byte) => byte.toString(16).padStart(2, "0")).join("");
}

// Returns gains that lower clips to the loudness of the quietest one; 1 for a clip of unknown loudness.
export function equalGains(loudnesses) {
  const known = loudnesses.filter((value) => value !== null && value !== undefined);
  const quietest = Math.min(...known);
  return loudnesses.map((value) => (value === null || value === undefined ? 1 : 10 ** ((quietest - value) / 20)));
}

// Plays buffers in sync, one of them audible. Calls `onTick(seconds)` while playing and `onEnd()` at the end.
export class Player {
  constructor({ onTick, onEnd }) {
    this.onTick = onTick;
    this.onEnd = onEnd;
    this.voices = [];
    this.audible = 0;
    this.loops = false;
    this.position = 0;
    this.isPlaying = false;
    this.frame = 0;
  }

  load(buffers, gains) {
    this.stop();
    this.voices = buffers.map((buffer, index) => ({ buffer, gain: gains[index], node: null, volume: null }));
    this.audible = 0;
    this.position = 0;
  }

  get duration() {
    return this.voices[this.audible]?.buffer.duration ?? 0;
  }

  get now() {
    if (!this.isPlaying) return this.position;
    const passed = this.position + audioContext().currentTime - this.startedAt;
    return this.loops ? passed % this.duration : Math.min(passed, this.duration);
  }

  async play() {
    if (this.isPlaying || !this.voices.length) return;
    const sound = audioContext();
    const { voices } = this;
    await sound.resume();
    if (this.isPlaying || this.voices !== voices) return; // another call started playback or loaded other buffers
    if (this.position >= this.duration - 0.01) this.position = 0;
    for (const [index, voice] of this.voices.entries()) {
      voice.volume = new GainNode(sound, { gain: index === this.audible ? voice.gain : 0 });
      voice.node = new AudioBufferSourceNode(sound, { buffer: voice.buffer, loop: this.loops });
      voice.node.connect(voice.volume).connect(sound.destination);
      voice.node.start(0, Math.min(this.position, voice.buffer.duration));
    }
    this.startedAt = sound.currentTime;
    this.isPlaying = true;
    const playing = this.voices[this.audible].node;
    playing.onended = () => {
      if (this.isPlaying && this.voices.some((voice) => voice.node === playing)) {
        this.stop();
        this.onEnd();
      }
    };
    this.tick();
  }

  stop() {
    const at = this.now;
    this.isPlaying = false;
    cancelAnimationFrame(this.frame);
    for (const voice of this.voices) {
      voice.node?.stop();
      voice.node = voice.volume = null;
    }
    this.position = at >= this.duration ? 0 : at;
  }

  async seek(seconds) {
    const wasPlaying = this.isPlaying;
    this.stop();
    this.position = Math.max(0, Math.min(seconds, this.duration));
    this.onTick(this.position);
    if (wasPlaying) await this.play();
  }

  async setLoop(loops) {
    const at = this.now;
    this.loops = loops;
    if (this.isPlaying) await this.seek(at);
  }

  select(index) {
    this.audible = index;
    for (const [each, voice] of this.voices.entries()) {
      voice.volume?.gain.setTargetAtTime(each === index ? voice.gain : 0, audioContext().currentTime, 0.005);
    }
  }

  tick() {
    this.onTick(this.now);
    this.frame = requestAnimationFrame(() => this.tick());
  }
}
