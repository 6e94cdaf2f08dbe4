// Playback: gapless, of one clip or of two in sync at equal loudness, and of long pieces, which may still be growing.

import { pause } from "./api.js";
import { audioContext, output } from "./audio.js";

// Has the position and the clock of both players. Calls `onTick(seconds)` while playing and `onEnd()` at the end.
class Playback {
  constructor({ onTick, onEnd }) {
    this.onTick = onTick;
    this.onEnd = onEnd;
    this.loops = false;
    this.position = 0;
    this.isPlaying = false;
    this.run = 0; // counts starts and stops, so that an earlier start ends
    this.frame = 0;
  }

  async seek(seconds) {
    const wasPlaying = this.isPlaying;
    if (wasPlaying) this.stop(); // a start that waits for the audio device goes on, from the new position
    this.position = Math.max(0, Math.min(seconds, this.duration));
    this.onTick(this.position);
    if (wasPlaying) await this.play();
  }

  async setLoop(loops) {
    const at = this.now;
    this.loops = loops;
    if (this.isPlaying) await this.seek(at);
  }

  end() {
    this.stop();
    this.onEnd();
  }

  tick() {
    this.onTick(this.now);
    this.frame = requestAnimationFrame(() => this.tick());
  }
}

// Plays buffers in sync, one of them audible. The first, which is the shown clip, sets the length.
export class Player extends Playback {
  constructor(buffers, callbacks) {
    super(callbacks);
    this.load(buffers, buffers.map(() => 1));
  }

  load(buffers, gains) {
    this.voices = buffers.map((buffer, index) => ({ buffer, gain: gains[index], node: null, volume: null }));
    this.audible = 0;
    this.position = 0;
  }

  get duration() {
    return this.voices[0].buffer.duration;
  }

  get now() {
    if (!this.isPlaying) return this.position;
    const passed = this.position + audioContext().currentTime - this.startedAt;
    return this.loops ? passed % this.duration : Math.min(passed, this.duration);
  }

  async play() {
    if (this.isPlaying) return;
    const sound = audioContext();
    const run = ++this.run;
    await sound.resume();
    if (run !== this.run) return; // another call started playback, or stopped it
    if (this.position >= this.duration - 0.01) this.position = 0;
    for (const [index, voice] of this.voices.entries()) {
      voice.volume = new GainNode(sound, { gain: index === this.audible ? voice.gain : 0 });
      voice.node = new AudioBufferSourceNode(sound, { buffer: voice.buffer, loop: this.loops });
      voice.node.connect(voice.volume).connect(output());
      voice.node.start(0, Math.min(this.position, voice.buffer.duration));
    }
    this.startedAt = sound.currentTime;
    this.isPlaying = true;
    const playing = this.voices[0].node;
    playing.onended = () => {
      if (this.isPlaying && this.voices.some((voice) => voice.node === playing)) this.end();
    };
    this.tick();
  }

  stop() {
    const at = this.now;
    this.run += 1;
    this.isPlaying = false;
    cancelAnimationFrame(this.frame);
    for (const voice of this.voices) {
      voice.node?.stop();
      voice.node = voice.volume = null;
    }
    this.position = at >= this.duration ? 0 : at;
  }

  select(index) {
    this.audible = index;
    for (const [each, voice] of this.voices.entries()) {
      voice.volume?.gain.setTargetAtTime(each === index ? voice.gain : 0, audioContext().currentTime, 0.005);
    }
  }
}

const CHUNK_S = 1;
const AHEAD_S = 3; // scheduled before it is heard

// Plays a GrowingWav in chunks. At the end of what has arrived it waits for more.
export class LongPlayer extends Playback {
  constructor(wav, callbacks) {
    super(callbacks);
    this.wav = wav;
    this.chunks = []; // scheduled: {node, at: seconds of the piece, when: seconds of the audio clock, duration}
  }

  get duration() {
    return this.wav.duration;
  }

  get now() {
    if (!this.isPlaying) return this.position;
    const clock = audioContext().currentTime;
    const chunk = this.chunks.findLast(({ when }) => when <= clock);
    return chunk ? chunk.at + Math.min(clock - chunk.when, chunk.duration) : this.position;
  }

  async play() {
    if (this.isPlaying) return;
    const run = ++this.run;
    await audioContext().resume();
    if (run !== this.run) return; // another call started playback, or stopped it
    this.isPlaying = true;
    if (this.wav.isComplete && this.position >= this.duration - 0.01) this.position = 0;
    this.tick();
    this.schedule(run).catch(() => run === this.run && this.end());
  }

  // Keeps AHEAD_S of audio scheduled until playback stops.
  async schedule(run) {
    const sound = audioContext();
    const { wav } = this;
    let next = Math.round(this.position * (wav.format?.rateHz ?? 0)); // sample of the piece
    let when = 0;
    while (run === this.run) {
      const buffer = await wav.read(next, CHUNK_S * (wav.format?.rateHz ?? 0));
      if (run !== this.run) return;
      if (!buffer && wav.isComplete && this.loops && next) {
        next = 0;
      } else if (!buffer && wav.isComplete) {
        await pause(1000 * (when - sound.currentTime));
        if (run === this.run) this.end();
        return;
      } else if (!buffer) {
        if (next < wav.numSamples || wav.isComplete) continue; // arrived meanwhile
        await new Promise((resume) => wav.changed.addEventListener("change", resume, { once: true }));
      } else {
        when = Math.max(when, sound.currentTime + 0.05);
        const node = new AudioBufferSourceNode(sound, { buffer });
        node.connect(output());
        node.start(when);
        this.chunks.push({ node, at: next / wav.format.rateHz, when, duration: buffer.duration });
        this.chunks = this.chunks.slice(-2 * (AHEAD_S / CHUNK_S));
        when += buffer.duration;
        next += buffer.length;
        await pause(1000 * (when - AHEAD_S - sound.currentTime));
      }
    }
  }

  stop() {
    const at = this.now;
    this.run += 1;
    this.isPlaying = false;
    cancelAnimationFrame(this.frame);
    for (const { node } of this.chunks) node.stop();
    this.chunks = [];
    this.position = this.wav.isComplete && at >= this.duration - 0.01 ? 0 : at;
  }
}
