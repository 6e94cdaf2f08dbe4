// Audio in the browser: the audio device with its volume, decoding, and helpers for samples. No page code.

let context = null;
let master = null;
let volume = 1;

export function audioContext() {
  if (!context && navigator.audioSession) navigator.audioSession.type = "playback"; // or silent iPhones play nothing
  context ??= new AudioContext();
  return context;
}

// Returns the node that everything audible connects to.
export function output() {
  if (!master) {
    master = new GainNode(audioContext(), { gain: volume });
    master.connect(audioContext().destination);
  }
  return master;
}

// Sets the volume, 0 to 1.
export function setVolume(value) {
  volume = value;
  master?.gain.setTargetAtTime(value, audioContext().currentTime, 0.01);
}

// Decodes at the file's own rate. Needs no audio device and no user gesture.
export async function decode(blob, rateHz) {
  const offline = new OfflineAudioContext({ numberOfChannels: 2, length: 1, sampleRate: rateHz });
  return offline.decodeAudioData(await blob.arrayBuffer());
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
