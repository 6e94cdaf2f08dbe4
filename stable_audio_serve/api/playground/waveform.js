// A take as waveform and spectrogram on one axis of time, with room before and behind it, and one region on it. Times
// that go in and out are seconds of the take: negative before its start, beyond its duration behind its end.

import Regions from "./vendor/regions.esm.js";
import Spectrogram from "./vendor/spectrogram.esm.js";
import WaveSurfer from "./vendor/wavesurfer.esm.js";

import { padded, wavBlob } from "./audio.js";

const ROOM = 0.25; // of the take's length, on either side
const LEAST_ROOM_S = 1;

export class Waveform {
  constructor(container, { onSeek, onRegion }) {
    const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
    const colours = () => ({ waveColor: colour("--wave"), progressColor: colour("--played"), cursorColor: colour("--text") });
    this.roomS = 0;
    this.regions = Regions.create();
    this.surfer = WaveSurfer.create({
      container,
      height: 128,
      ...colours(),
      sampleRate: 44100,
      cspNonce: document.querySelector('meta[name="csp-nonce"]').content,
      plugins: [
        this.regions,
        Spectrogram.create({ height: 128, fftSamples: 512, scale: "mel", labels: false, useWebWorker: true, colorMap: "roseus" }),
      ],
    });
    this.surfer.setMuted(true);
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => this.surfer.setOptions(colours()));
    this.surfer.on("interaction", (time) => onSeek(time - this.roomS));
    this.regions.enableDragSelection({ color: colour("--accent-soft") });
    this.onRegion = onRegion;
    this.regions.on("region-created", (created) => {
      for (const other of this.regions.getRegions()) if (other !== created) other.remove();
      this.meetTake();
    });
    this.regions.on("region-updated", () => this.meetTake());
    this.regions.on("region-removed", () => onRegion(this.region));
    this.accent = colour("--accent-soft");
  }

  // `mostS` is the longest clip that the model makes.
  async show(buffer, mostS) {
    this.buffer = buffer;
    this.mostRoomS = Math.max(0, mostS - buffer.duration);
    await this.draw(Math.max(ROOM * buffer.duration, LEAST_ROOM_S));
  }

  async draw(roomS) {
    this.clear();
    this.roomS = Math.min(roomS, this.mostRoomS);
    try {
      await this.surfer.loadBlob(wavBlob(padded(this.buffer, this.roomS, this.roomS)));
    } catch (error) {
      if (error.name !== "AbortError") throw error; // another take is shown by now
    }
  }

  moveTo(seconds) {
    if (this.surfer.getDuration()) this.surfer.setTime(seconds + this.roomS);
  }

  get region() {
    const [region] = this.regions.getRegions();
    return region ? { start: region.start - this.roomS, end: region.end - this.roomS } : null;
  }

  // Marks a region, and makes room for it if there is too little.
  async mark(start, end) {
    if (Number.isNaN(start + end)) return; // a field is empty
    const roomS = Math.max(-start, end - this.buffer.duration);
    if (roomS > this.roomS && this.roomS < this.mostRoomS) await this.draw(roomS);
    const times = { start: start + this.roomS, end: end + this.roomS };
    const [region] = this.regions.getRegions();
    if (!region) this.regions.addRegion({ ...times, color: this.accent, drag: true, resize: true });
    else {
      region.setOptions(times);
      this.meetTake();
    }
  }

  // A region wholly in the room behind the take or before it is stretched to it: a gap would be kept as silence.
  meetTake() {
    if (!this.buffer) return this.clear(); // nothing is drawn yet
    const [region] = this.regions.getRegions();
    const [start, end] = [this.roomS, this.roomS + this.buffer.duration];
    if (region.start > end) region.setOptions({ start: end });
    if (region.end < start) region.setOptions({ end: start });
    return this.onRegion(this.region);
  }

  clear() {
    this.regions.clearRegions();
  }
}
