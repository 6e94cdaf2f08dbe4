// The view of a clip on one time axis: ruler, waveform, spectrogram, the room to extend it, a region and the playhead.
// All times are seconds relative to the clip's start: negative before it, above its duration past its end.

import { BANDS } from "./picture.js";
import { formatTime } from "./words.js";

const ROOM = 0.2; // of the clip's length, on each side
const LEAST_ROOM_S = 1;
const RULER = 24; // CSS pixels
const WAVE = 128;
const SPECTROGRAM = 128;
const LEAST_TICK = 64; // CSS pixels between labels of the ruler
const LEAST_DRAG = 4; // CSS pixels; shorter drags are clicks
const LEAST_SPAN_S = 0.05; // visible at the highest zoom
const BEATS_PER_BAR = 4;
const STEPS_S = [0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 15, 30, 60, 120, 300, 600];
const STEPS_BEATS = [1, 4, 16, 64, 256];

const element = (id) => document.getElementById(id);
const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

export class View {
  // Calls `onSeek(seconds)` at a click, `onRegion(region)` with {start, end} or null when the region changes.
  constructor({ onSeek, onRegion }) {
    this.node = element("wave");
    this.track = this.node.querySelector(".track");
    this.canvas = this.node.querySelector("canvas");
    this.playhead = element("playhead");
    this.onSeek = onSeek;
    this.onRegion = onRegion;
    this.picture = null;
    this.region = null;
    this.tempo = null;
    this.snaps = false;
    this.marks = [];
    this.zoom = 1;
    this.frame = 0;
    this.setExtent(0, 0, 0);
    this.node.addEventListener("scroll", () => this.redraw());
    new ResizeObserver(() => this.redraw()).observe(this.node);
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => this.redraw());
    this.track.addEventListener("pointerdown", (event) => this.press(event));
    this.node.addEventListener("wheel", (event) => {
      if (!event.ctrlKey) return;
      event.preventDefault();
      this.zoomBy(Math.exp(-event.deltaY / 200), this.timeOf(event));
    });
    element("extend-before").addEventListener("click", () => this.mark(-this.roomS, 0));
    element("extend-after").addEventListener("click", () => this.mark(this.duration, this.duration + this.roomS));
  }

  // Shows a picture. `mostS` is the longest clip of the model in seconds, 0 if the clip cannot be edited; `tempo` is in
  // beats per minute or null; `marks` are the ends of sections in seconds.
  show({ picture, duration, mostS = 0, tempo = null, marks = [] }) {
    const mostRoomS = Math.max(0, mostS - duration);
    Object.assign(this, { picture, tempo, marks, canEdit: mostS > 0, zoom: 1 });
    this.clear();
    this.setExtent(duration, Math.min(Math.max(ROOM * duration, LEAST_ROOM_S), mostRoomS), mostRoomS);
    this.moveTo(0);
  }

  setExtent(duration, roomS, mostRoomS) {
    Object.assign(this, { duration, roomS, mostRoomS });
    for (const [id, start] of [["room-before", -roomS], ["room-after", duration]]) {
      element(id).hidden = !roomS;
      this.place(element(id), start, start + roomS);
    }
    this.redraw();
  }

  get total() {
    return this.duration + 2 * this.roomS;
  }

  place(node, start, end) {
    node.style.left = `${(100 * (start + this.roomS)) / this.total}%`;
    node.style.width = `${(100 * (end - start)) / this.total}%`;
  }

  timeOf(event) {
    const { left, width } = this.track.getBoundingClientRect();
    return (Math.max(0, Math.min(1, (event.clientX - left) / width)) * this.total) - this.roomS;
  }

  // Moves the playhead. With `follows`, scrolls a zoomed view so that the playhead stays visible.
  moveTo(seconds, { follows = false } = {}) {
    const share = this.total ? (seconds + this.roomS) / this.total : 0;
    this.playhead.style.left = `${100 * share}%`;
    this.playhead.setAttribute("aria-valuemax", this.duration.toFixed(2));
    this.playhead.setAttribute("aria-valuenow", seconds.toFixed(2));
    this.playhead.setAttribute("aria-valuetext", formatTime(seconds));
    if (!follows || this.zoom === 1) return;
    const x = share * this.track.clientWidth - this.node.scrollLeft;
    if (x < 0 || x > this.node.clientWidth) this.node.scrollLeft += x - 0.1 * this.node.clientWidth;
  }

  // ---- zoom ----

  zoomBy(factor, around = this.centre) {
    if (!this.total) return; // no clip is shown
    const most = Math.max(1, this.total / LEAST_SPAN_S);
    const share = (around + this.roomS) / this.total;
    const x = share * this.track.clientWidth - this.node.scrollLeft;
    this.zoom = Math.max(1, Math.min(most, this.zoom * factor));
    this.track.style.width = `${100 * this.zoom}%`;
    this.node.scrollLeft = share * this.track.clientWidth - x;
    this.redraw();
  }

  // The time that stays in place when the user zooms by a button or a key: the playhead if it is visible.
  get centre() {
    const now = Number(this.playhead.getAttribute("aria-valuenow"));
    const { from, to } = this.visible;
    return now >= from && now <= to ? now : (from + to) / 2;
  }

  get visible() {
    const perPixel = this.total / (this.track.clientWidth || 1);
    const from = this.node.scrollLeft * perPixel - this.roomS;
    return { from, to: from + this.node.clientWidth * perPixel };
  }

  // ---- the region ----

  // Marks a region and adds room for it if needed.
  mark(start, end) {
    if (Number.isNaN(start + end) || !this.canEdit) return; // a field is empty, or no clip is shown
    const [first, last] = [Math.min(start, end), Math.max(start, end)];
    const roomS = Math.min(this.mostRoomS, Math.max(-first, last - this.duration));
    if (roomS > this.roomS) this.setExtent(this.duration, roomS, this.mostRoomS);
    // A region outside the clip reaches up to the clip, because a gap would remain silent.
    const kept = (time) => Math.max(-this.roomS, Math.min(this.duration + this.roomS, time));
    this.region = { start: Math.min(kept(first), this.duration), end: Math.max(kept(last), 0) };
    element("region").hidden = false;
    this.place(element("region"), this.region.start, this.region.end);
    this.onRegion(this.region);
  }

  clear() {
    this.region = null;
    element("region").hidden = true;
    this.track.style.width = `${100 * this.zoom}%`;
    this.onRegion(null);
  }

  // Returns the nearest beat if snapping is on.
  snap(time) {
    if (!this.snaps || !this.tempo) return time;
    return (Math.round((time * this.tempo) / 60) * 60) / this.tempo;
  }

  // A press on the ruler moves the playhead; by touch a drag there scrolls. Elsewhere a click moves the playhead, and a
  // drag marks a region, moves it or its edge.
  press(event) {
    if (event.button || !this.duration || event.target.closest("button")) return;
    const isRuler = event.clientY - this.track.getBoundingClientRect().top < RULER || event.target === this.playhead;
    const began = this.timeOf(event);
    const before = this.region;
    const edge = event.target.dataset.edge;
    const isInside = event.target === element("region");
    const scrolled = this.node.scrollLeft;
    let isDrag = false;
    const move = (moved) => {
      const now = this.timeOf(moved);
      if (isRuler && event.pointerType !== "touch") return this.onSeek(now);
      if (!isDrag && Math.abs(moved.clientX - event.clientX) < LEAST_DRAG) return undefined;
      isDrag = true;
      if (isRuler) return this.node.scrollTo(scrolled + event.clientX - moved.clientX, 0);
      if (edge) return this.mark(this.snap(now), before[edge === "start" ? "end" : "start"]);
      if (!isInside) return this.mark(this.snap(began), this.snap(now));
      const start = this.snap(before.start + now - began);
      return this.mark(start, start + before.end - before.start);
    };
    const press = new AbortController();
    const { signal } = press;
    const end = (last) => {
      press.abort(); // removes all three listeners
      if (last.type === "pointerup" && !isDrag) this.onSeek(this.timeOf(last));
    };
    this.track.setPointerCapture(event.pointerId);
    this.track.addEventListener("pointermove", move, { signal });
    for (const type of ["pointerup", "pointercancel"]) this.track.addEventListener(type, end, { signal });
  }

  // ---- drawing ----

  redraw() {
    this.frame ||= requestAnimationFrame(() => {
      this.frame = 0;
      this.draw();
    });
  }

  draw() {
    const { canvas, picture } = this;
    const ratio = devicePixelRatio;
    const width = this.node.clientWidth;
    const height = RULER + WAVE + SPECTROGRAM;
    canvas.width = Math.round(width * ratio);
    canvas.height = height * ratio;
    canvas.style.width = `${width}px`;
    canvas.style.height = `${height}px`;
    const paint = canvas.getContext("2d");
    paint.scale(ratio, ratio);
    if (!this.total) return;
    const { from, to } = this.visible;
    const scale = width / (to - from);
    const x = (time) => (time - from) * scale;
    if (picture) this.drawSpectrogram(paint, { x, from, to, width });
    this.drawRuler(paint, { x, from, to, width, scale });
    if (picture) this.drawWave(paint, { from, width, scale });
    this.drawMarks(paint, { x });
  }

  drawWave(paint, { from, width, scale }) {
    paint.fillStyle = colour("--wave");
    const middle = RULER + WAVE / 2;
    const least = 1 / devicePixelRatio;
    for (let pixel = 0; pixel < width; pixel += least) {
      const found = this.picture.extremes(from + pixel / scale, from + (pixel + least) / scale);
      if (!found) continue;
      const [top, bottom] = [found[1], -found[0]].map((value) => Math.max(0.5, Math.min(1, value) * (WAVE / 2 - 4)));
      paint.fillRect(pixel, middle - top, least, top + bottom);
    }
  }

  // Draws the number of each section where it starts, and a line at its end.
  drawMarks(paint, { x }) {
    this.marks.forEach((end, index) => {
      paint.fillStyle = colour("--muted");
      const start = this.marks[index - 1] ?? 0;
      if (index) paint.fillRect(Math.round(x(start)), RULER, 1, WAVE + SPECTROGRAM);
      if (x(end) - x(start) > 20) paint.fillText(String(index + 1), x(start) + 5, RULER + 10);
    });
  }

  drawSpectrogram(paint, { x, from, to, width }) {
    const { first, last, seconds } = this.picture.columns(from, to);
    if (last < first) return;
    const num = Math.min(last - first + 1, Math.ceil(width));
    const image = new ImageData(num, BANDS);
    const pixels = new Uint32Array(image.data.buffer);
    const colours = levelColours();
    const { data } = this.picture.levels;
    const step = (last - first + 1) / num;
    for (let column = 0; column < num; column++) {
      const start = (first + Math.floor(column * step)) * BANDS;
      for (let band = 0; band < BANDS; band++) pixels[(BANDS - 1 - band) * num + column] = colours[data[start + band]];
    }
    const small = new OffscreenCanvas(num, BANDS);
    small.getContext("2d").putImageData(image, 0, 0);
    const left = Math.max(x((first - 0.5) * seconds), x(0));
    const right = Math.min(x((last + 0.5) * seconds), x(this.duration));
    paint.drawImage(small, left, RULER + WAVE, right - left, SPECTROGRAM);
  }

  // Draws labels, and over the waveform lines: in seconds, or while regions snap in bars and beats.
  drawRuler(paint, { x, from, to, width, scale }) {
    const beat = this.snaps && this.tempo ? 60 / this.tempo : null;
    const steps = beat ? STEPS_BEATS.map((beats) => beats * beat) : STEPS_S;
    const step = steps.find((each) => each * scale >= LEAST_TICK) ?? steps.at(-1);
    paint.font = "11px system-ui, sans-serif";
    paint.textBaseline = "middle";
    const line = (time, top, bottom) => paint.fillRect(Math.round(x(time)), top, 1, bottom - top);
    const each = (size, act) => {
      for (let index = Math.ceil(from / size); index * size <= to; index++) act(index * size, index);
    };
    paint.fillStyle = colour("--line");
    paint.fillRect(0, RULER - 1, width, 1);
    if (beat && beat * scale > 6) each(beat, (time) => line(time, RULER, RULER + WAVE));
    else each(step, (time) => line(time, RULER, RULER + WAVE));
    if (!beat) each(step / 5, (time) => line(time, RULER - 5, RULER));
    each(step, (time, index) => {
      paint.fillStyle = colour("--line");
      line(time, RULER - 10, RULER);
      paint.fillStyle = colour("--muted");
      const text = beat ? barText(Math.round(index * (step / beat))) : formatTime(time, step);
      if (x(time) + paint.measureText(text).width < width) paint.fillText(text, x(time) + 4, RULER / 2 - 2);
    });
  }
}

// Returns a beat as "bar.beat", counted from 1, such as 3.2.
function barText(beats) {
  const bar = Math.floor(beats / BEATS_PER_BAR);
  return `${bar + 1}.${beats - bar * BEATS_PER_BAR + 1}`;
}

// Returns the colour of each level 0 to 255, as the theme defines them, as pixels of an ImageData.
function levelColours() {
  const paint = new OffscreenCanvas(256, 1).getContext("2d");
  const gradient = paint.createLinearGradient(0, 0, 256, 0);
  for (const index of [0, 1, 2, 3]) gradient.addColorStop(index / 3, colour(`--level-${index}`));
  paint.fillStyle = gradient;
  paint.fillRect(0, 0, 256, 1);
  return new Uint32Array(paint.getImageData(0, 0, 256, 1).data.buffer);
}
