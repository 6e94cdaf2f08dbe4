// Shows a clip as waveform and spectrogram on one time axis, with space before and after it, and one region. All times
// are seconds relative to the clip's start: negative before it, above its duration past its end.

import Regions from "./vendor/regions.esm.js";
import Spectrogram from "./vendor/spectrogram.esm.js";
import WaveSurfer from "./vendor/wavesurfer.esm.js";

import { padded, wavBlob } from "./audio.js";

const ROOM = 0.25; // of the clip's length, on each side
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
      this.closeGap();
    });
    this.regions.on("region-updated", () => this.closeGap());
    this.regions.on("region-removed", () => onRegion(this.region));
    this.accent = colour("--accent-soft");
  }

  // `mostS` is the longest clip of the model, seconds.
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
      if (error.name !== "AbortError") throw error; // another clip is shown by now
    }
  }

  moveTo(seconds) {
    if (this.surfer.getDuration()) this.surfer.setTime(seconds + this.roomS);
  }

  get region() {
    const [region] = this.regions.getRegions();
    return region ? { start: region.start - this.roomS, end: region.end - this.roomS } : null;
  }

  // Marks a region and adds space for it if needed.
  async mark(start, end) {
    if (Number.isNaN(start + end)) return; // a field is empty
    const roomS = Math.max(-start, end - this.buffer.duration);
    if (roomS > this.roomS && this.roomS < this.mostRoomS) await this.draw(roomS);
    const times = { start: start + this.roomS, end: end + this.roomS };
    const [region] = this.regions.getRegions();
    if (!region) this.regions.addRegion({ ...times, color: this.accent, drag: true, resize: true });
    else {
      region.setOptions(times);
      this.closeGap();
    }
  }

  // Extends a region outside the clip up to the clip, because a gap would remain silent.
  closeGap() {
    if (!this.buffer) return this.clear(); // no clip is shown yet
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
