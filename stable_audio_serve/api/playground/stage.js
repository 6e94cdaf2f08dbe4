// The stage: shows one clip and plays it, alone or compared with the clip shown before, and marks a region of it.

import { describe } from "./adapters.js";
import { call, pause } from "./api.js";
import { decode, equalGains, setVolume } from "./audio.js";
import { FORMATS } from "./orders.js";
import { LONG_HOP, Picture } from "./picture.js";
import { LongPlayer, Player } from "./player.js";
import { lengthOf } from "./sections.js";
import { preference, setPreference } from "./store.js";
import { View } from "./view.js";
import { GrowingWav } from "./wav.js";
import { formatTime, tempoOf, titleOf } from "./words.js";

const element = (id) => document.getElementById(id);
const TRANSPORT = ["play", "loop", "zoom-in", "zoom-out", "zoom-fit"];
const ZOOM = 1.6;
const MOST_FAILURES = 20; // to read a long piece
const CLICK_S = 0.02; // a region so short is a slip of the hand

const isLoop = ({ fields }) => Boolean(fields.loop);

// Returns the end of each section of a piece in seconds.
const ends = (sections) => sections.map((_, index) => lengthOf(sections.slice(0, index + 1)));

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
    this.receiving = null; // AbortController of the shown long piece
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
    on("region-strength", "input", () => (element("region-strength-box").querySelector("output").value = element("region-strength").value));
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
    const isSame = this.shown?.isGrowing && this.shown.id === clip.id && this.shown.durationS === clip.durationS;
    if (isSame) return this.describe(clip); // plays and draws on
    this.chosen = clip;
    const { sections } = clip.order.fields;
    const buffer = sections ? null : await decode(clip.blob, clip.rateHz);
    if (this.chosen !== clip) return; // the user chose another clip
    if (sections) return this.showLong(clip, { plays, open: () => clip.blob.stream() });
    const picture = new Picture(clip.rateHz);
    this.present(clip, { player: new Player([buffer], this.callbacks), buffer });
    this.view.show({ picture, duration: buffer.duration, mostS: Math.max(buffer.duration, this.longestOf(clip.model)), tempo: tempoOf(clip.order) });
    this.start(plays);
    await picture.addBuffer(buffer, { isStale: () => this.shown !== clip, onGrow: () => this.view.redraw() });
  }

  // Shows a long piece whose sections are still being made: what there is, and the rest as it is finished.
  async showGrowing(job, { plays }) {
    const { order } = job;
    if (this.shown?.id === job.id) return plays && !this.player.isPlaying && this.playOrPause();
    const piece = { id: job.id, order, isGrowing: true, model: order.fields.model, facts: { seed: order.fields.seed }, durationS: lengthOf(order.fields.sections) };
    this.chosen = piece;
    const open = async (signal) => (await call(`jobs/${job.acceptedAs}/audio?follow=1`, { signal })).body;
    return this.showLong(piece, { plays, open });
  }

  // Shows a piece that is too long to decode at once. `open(signal)` opens the stream of its WAV file.
  async showLong(clip, { plays, open }) {
    const wav = new GrowingWav(clip.blob);
    let picture = null;
    this.present(clip, { player: new LongPlayer(wav, this.callbacks), buffer: null });
    this.receiving = new AbortController();
    const { signal } = this.receiving;
    const show = (made) => this.view.show({ picture: made, duration: clip.durationS, marks: ends(clip.order.fields.sections) });
    show(null);
    this.start(plays);
    const onSamples = (channels, rateHz) => {
      if (!picture) show((picture = new Picture(rateHz, LONG_HOP)));
      picture.add(channels);
      this.view.redraw();
    };
    for (let failures = 0; !wav.isComplete && !signal.aborted; failures += 1) {
      try {
        await wav.follow(await open(signal), { onSamples, signal });
      } catch (error) {
        if (signal.aborted) return;
        if (failures >= MOST_FAILURES) throw error;
        await pause(1000);
      }
    }
  }

  start(plays) {
    this.player.onTick(0);
    this.showPlaying();
    if (plays) this.player.play().then(() => this.showPlaying(), this.onError);
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

  // Puts a clip and its player on the stage.
  present(clip, { buffer, player }) {
    this.player?.stop();
    this.receiving?.abort();
    if (this.shown && this.shown.id !== clip.id) this.other = this.shown.isGrowing ? null : this.shown;
    Object.assign(this, { buffer, player });
    this.say("");
    this.describe(clip);
    element("ab").setAttribute("aria-pressed", "false");
    this.setSnap(buffer && tempoOf(clip.order));
    this.setLoop(isLoop(clip.order) || this.wantsLoop);
  }

  // Shows the facts of a clip, and the buttons that are of use for it.
  describe(clip) {
    this.shown = clip;
    const { order, facts } = clip;
    element("clip-name").textContent = order.fields.prompt;
    const loudness = typeof facts.loudness === "number" ? `${facts.loudness.toFixed(1)} LUFS` : "";
    const device = facts.device ? `${facts.device} ${facts.dtype ?? ""}` : "";
    const parts = [clip.model, describe(order.fields), `seed ${facts.seed}`, formatTime(clip.durationS ?? this.buffer.duration), loudness, device];
    element("clip-facts").textContent = parts.filter(Boolean).join(" · ");
    for (const id of TRANSPORT) element(id).disabled = false;
    const formats = order.fields.sections ? FORMATS.slice(0, 1) : FORMATS; // only a job can make a long piece again
    element("format").replaceChildren(...formats.map(({ name }, index) => new Option(name, index)));
    element("examples").hidden = true;
    element("playhead").hidden = false;
    for (const id of ["clip-tools", "recipe"]) element(id).hidden = Boolean(clip.isGrowing);
    for (const id of ["edit-tools", "use-source", "repeat"]) element(id).hidden = Boolean(order.fields.sections);
    this.showOther();
    document.documentElement.dataset.shown = clip.id;
  }

  // Forgets a deleted clip: as the one to be shown, and as the one to compare with. If the latter is audible, the shown
  // clip is from now on.
  forget(clip) {
    if (this.chosen?.id === clip.id) this.chosen = null;
    if (this.shown?.id === clip.id) return this.clear();
    if (this.other?.id === clip.id) {
      if (this.player.audible) this.hear(0);
      this.other = null;
    }
    this.showOther();
  }

  // Takes the clip off the stage.
  clear() {
    this.player.stop();
    this.receiving?.abort();
    this.shown = this.other = null;
    this.view.show({ picture: null, duration: 0 });
    this.start(false);
    this.setSnap(null);
    this.say("");
    for (const id of [...TRANSPORT, "ab"]) element(id).disabled = true;
    for (const id of ["playhead", "clip-tools", "recipe"]) element(id).hidden = true;
    element("examples").hidden = false;
    element("clip-name").textContent = "No clip selected";
    element("clip-facts").textContent = "";
    delete document.documentElement.dataset.shown;
  }

  showOther() {
    const isLong = (clip) => Boolean(clip.order.fields.sections);
    element("ab").disabled = !this.other || isLong(this.other) || isLong(this.shown);
  }

  showPlaying() {
    element("play").textContent = this.player.isPlaying ? "Pause" : "Play";
  }

  showRegion(region) {
    const isShown = Boolean(region && this.shown);
    element("region-tools").hidden = !isShown;
    if (!isShown) return;
    const isAfter = region.end > this.duration + 0.01;
    const isBefore = region.start < -0.01;
    const where = isAfter ? "past the end of the clip" : isBefore ? "before the start of the clip" : "of the clip";
    element("region-line").textContent = `${(region.end - region.start).toFixed(2)} s ${where}`;
    element("region-start").value = region.start.toFixed(2);
    element("region-end").value = region.end.toFixed(2);
    element("region-strength-box").hidden = isAfter || isBefore;
    element("regenerate").textContent = isAfter || isBefore ? "Extend" : "Regenerate";
    element("regenerate").disabled = region.end - region.start < CLICK_S;
  }

  // Strength of a region inside the clip: how far it may differ from what is there. Null if it starts from noise.
  get strength() {
    const strength = element("region-strength").valueAsNumber;
    return element("region-strength-box").hidden || strength === 1 ? null : strength;
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
    if (!isLoop(this.shown.order)) this.wantsLoop = this.player.loops;
  }

  async setLoop(loops) {
    element("loop").setAttribute("aria-pressed", String(loops));
    await this.player.setLoop(loops);
  }

  // Plays the shown clip and the previous one in sync at equal loudness, and switches the audible one.
  async toggleAB() {
    const { shown, other, player } = this;
    let plays = false;
    if (player.voices.length < 2) {
      const sound = await decode(other.blob, other.rateHz);
      if (this.shown !== shown || this.other !== other) return; // another clip is shown by now, or one is deleted
      const at = player.now;
      plays = player.isPlaying;
      player.stop();
      player.load([this.buffer, sound], equalGains([shown.facts.loudness, other.facts.loudness]));
      await player.seek(at);
    }
    this.hear(1 - player.audible);
    if (plays) await player.play();
    this.showPlaying();
  }

  // Makes the shown clip (0) or the previous one (1) audible.
  hear(index) {
    this.player.select(index);
    element("ab").setAttribute("aria-pressed", String(index === 1));
    this.say(index ? `Playing the previous clip: ${titleOf(this.other)}` : "Playing the shown clip");
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
