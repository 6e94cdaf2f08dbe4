// The stage: shows one clip and plays it, alone or compared with the clip shown before, and marks a region of it.

import { describe } from "./adapters.js";
import { decode, equalGains, setVolume } from "./audio.js";
import { FORMATS } from "./orders.js";
import { LONG_HOP, Picture } from "./picture.js";
import { LongPlayer, Player } from "./player.js";
import { preference, setPreference } from "./store.js";
import { View } from "./view.js";
import { GrowingWav } from "./wav.js";
import { formatTime, tempoOf, titleOf } from "./words.js";

const element = (id) => document.getElementById(id);
const TRANSPORT = ["play", "loop", "zoom-in", "zoom-out", "zoom-fit"];
const ZOOM = 1.6;
const CLICK_S = 0.02; // a region so short is a slip of the hand

export class Stage {
  // `longestOf(model)` returns the longest clip of a model in seconds.
  constructor({ longestOf, onError }) {
    this.longestOf = longestOf;
    this.onError = onError;
    this.chosen = null; // the clip to be shown
    this.shown = null; // the shown clip
    this.other = null; // the previously shown clip, for A / B
    this.buffer = null; // audio of the shown clip; null for a long piece
    this.player = null;
    this.wantsLoop = false; // the user's choice for clips that are no loops
    this.view = new View({ onSeek: (seconds) => this.seek(seconds), onRegion: (region) => this.showRegion(region) });
    this.listen();
  }

  listen() {
    const on = (id, event, act) => element(id).addEventListener(event, () => this.attempt(act));
    on("play", "click", () => this.playOrPause());
    on("loop", "click", () => this.toggleLoop());
    on("ab", "click", () => this.toggleAB());
    on("snap", "click", () => this.toggleSnap());
    on("zoom-in", "click", () => this.view.zoomBy(ZOOM));
    on("zoom-out", "click", () => this.view.zoomBy(1 / ZOOM));
    on("zoom-fit", "click", () => this.view.zoomBy(0));
    on("region-clear", "click", () => this.view.clear());
    on("mark-region", "click", () => this.view.mark(this.view.snap(this.duration * 0.25), this.view.snap(this.duration * 0.75)));
    on("region-start", "change", () => this.moveEdge({ start: element("region-start").valueAsNumber }));
    on("region-end", "change", () => this.moveEdge({ end: element("region-end").valueAsNumber }));
    on("volume", "input", () => this.setVolume(element("volume").valueAsNumber));
    element("volume").value = preference("volume", "1");
    setVolume(element("volume").valueAsNumber);
  }

  async attempt(act) {
    try {
      await act();
    } catch (error) {
      this.onError(error);
    }
  }

  get duration() {
    return this.view.duration;
  }

  // Scrolls to the stage if it is out of sight, as it is below the form on a phone.
  reveal() {
    const { top } = element("stage").getBoundingClientRect();
    if (top < 0 || top > innerHeight / 2) element("stage").scrollIntoView();
  }

  // ---- showing ----

  async show(clip, { plays = false } = {}) {
    this.chosen = clip;
    const isLong = Boolean(clip.order.fields.sections);
    const buffer = isLong ? null : await decode(clip.blob, clip.rateHz);
    if (this.chosen !== clip) return; // the user chose another clip
    if (this.shown && this.shown.id !== clip.id) this.other = this.shown;
    const wav = isLong ? new GrowingWav() : null;
    this.present(clip, { buffer, player: wav ? new LongPlayer(wav, this.callbacks) : new Player([buffer], this.callbacks) });
    const picture = new Picture(clip.rateHz, isLong ? LONG_HOP : undefined);
    const duration = buffer?.duration ?? clip.durationS;
    const mostS = isLong ? 0 : Math.max(duration, this.longestOf(clip.model));
    this.view.show({ picture, duration, mostS, tempo: tempoOf(clip.order) });
    element("edit-tools").hidden = isLong;
    this.player.onTick(0);
    if (plays) this.player.play().then(() => this.showPlaying(), this.onError);
    const onGrow = () => this.view.redraw();
    if (buffer) await picture.addBuffer(buffer, { isStale: () => this.shown !== clip, onGrow });
    else await wav.follow(clip.blob.stream(), (channels) => (picture.add(channels), onGrow()));
  }

  get callbacks() {
    return {
      onTick: (seconds) => {
        this.view.moveTo(seconds, { follows: this.player.isPlaying });
        element("clock").value = `${formatTime(seconds)} / ${formatTime(this.duration)}`;
      },
      onEnd: () => this.showPlaying(),
    };
  }

  // Shows the facts of a clip, and the buttons that are of use for it.
  present(clip, { buffer, player }) {
    this.player?.stop();
    Object.assign(this, { shown: clip, buffer, player });
    const { order, facts } = clip;
    element("clip-name").textContent = order.fields.prompt;
    const loudness = typeof facts.loudness === "number" ? `${facts.loudness.toFixed(1)} LUFS` : "";
    const device = facts.device ? `${facts.device} ${facts.dtype ?? ""}` : "";
    const parts = [clip.model, describe(order.fields), `seed ${facts.seed}`, formatTime(buffer?.duration ?? clip.durationS), loudness, device];
    element("clip-facts").textContent = parts.filter(Boolean).join(" · ");
    for (const id of TRANSPORT) element(id).disabled = false;
    element("format").replaceChildren(...FORMATS[order.kind].map((format) => new Option(format)));
    for (const id of ["clip-tools", "recipe", "playhead"]) element(id).hidden = false;
    element("examples").hidden = true;
    element("ab").setAttribute("aria-pressed", "false");
    this.setSnap(tempoOf(order));
    this.showOther();
    this.setLoop(order.kind === "loop" || this.wantsLoop);
    document.documentElement.dataset.shown = clip.id;
    this.showPlaying();
  }

  // Forgets a deleted clip as the one to compare with.
  forget(clip) {
    if (this.other?.id === clip.id) this.other = null;
    this.showOther();
  }

  showOther() {
    const isLong = (clip) => clip.order.fields.sections;
    element("ab").disabled = !this.other || isLong(this.other) || isLong(this.shown);
  }

  showPlaying() {
    element("play").textContent = this.player.isPlaying ? "Pause" : "Play";
  }

  showRegion(region) {
    const isShown = Boolean(region && this.shown);
    element("region-tools").hidden = !isShown;
    if (!isShown) return;
    const where = region.end > this.duration + 0.01 ? "past the end of the clip" : region.start < -0.01 ? "before the start of the clip" : "of the clip";
    element("region-line").textContent = `${(region.end - region.start).toFixed(2)} s ${where}`;
    element("region-start").value = region.start.toFixed(2);
    element("region-end").value = region.end.toFixed(2);
    element("regenerate").disabled = region.end - region.start < CLICK_S;
  }

  // Moves an edge of the region. An edge that passes the other takes it along.
  moveEdge({ start, end }) {
    const { region } = this.view;
    const length = region.end - region.start;
    if (end === undefined) return this.view.mark(start, start < region.end ? region.end : start + length);
    return this.view.mark(end > region.start ? region.start : end - length, end);
  }

  // ---- playing ----

  async playOrPause() {
    if (this.player.isPlaying) this.player.stop();
    else await this.player.play();
    this.showPlaying();
  }

  async seek(seconds) {
    await this.player?.seek(seconds);
  }

  async toggleLoop() {
    await this.setLoop(!this.player.loops);
    if (this.shown.order.kind !== "loop") this.wantsLoop = this.player.loops;
  }

  async setLoop(loops) {
    element("loop").setAttribute("aria-pressed", String(loops));
    await this.player.setLoop(loops);
  }

  // Plays the shown clip and the previous one in sync at equal loudness, and switches the audible one.
  async toggleAB() {
    const { shown, other, player } = this;
    if (player.voices.length < 2) {
      const sound = await decode(other.blob, other.rateHz);
      if (this.shown !== shown) return; // another clip is shown by now
      const at = player.now;
      const wasPlaying = player.isPlaying;
      player.stop();
      player.load([this.buffer, sound], equalGains([shown.facts.loudness, other.facts.loudness]));
      await player.seek(at);
      if (wasPlaying) await player.play();
    }
    const audible = 1 - player.audible;
    player.select(audible);
    element("ab").setAttribute("aria-pressed", String(audible === 1));
    this.say(audible ? `Playing the previous clip: ${titleOf(other)}` : "Playing the shown clip");
    this.showPlaying();
  }

  setVolume(value) {
    setVolume(value);
    setPreference("volume", String(value));
  }

  // ---- beats ----

  // Shows the button that makes regions snap to beats, for clips whose tempo is known.
  setSnap(tempo) {
    element("snap").hidden = !tempo;
    element("snap").title = tempo ? `${tempo} bpm` : "";
    this.view.snaps = preference("snap", "on") === "on";
    element("snap").setAttribute("aria-pressed", String(this.view.snaps));
  }

  toggleSnap() {
    setPreference("snap", this.view.snaps ? "off" : "on");
    this.setSnap(this.view.tempo);
    this.view.redraw();
  }

  say(message) {
    element("said").textContent = message;
  }
}
