// Takes and unfinished jobs in this browser (IndexedDB), so that a reload forgets nothing. Where a browser keeps nothing,
// as in some private windows or on a full disk, they last as long as the page.

const NAME = "stable-audio-serve";
const STORES = ["takes", "jobs"];
let database = null;
const memory = { takes: new Map(), jobs: new Map() };
const otherTabs = new BroadcastChannel(NAME);
const AUTOPLAY = `${NAME}.autoplay`;

const done = (request) =>
  new Promise((resolve, reject) => {
    request.onsuccess = () => resolve(request.result);
    request.onerror = () => reject(request.error);
  });

export async function open() {
  try {
    const request = indexedDB.open(NAME, 1);
    request.onupgradeneeded = () => STORES.forEach((store) => request.result.createObjectStore(store, { keyPath: "id" }));
    database = await done(request);
    database.onversionchange = () => database.close();
  } catch {
    database = null;
  }
}

const within = (store, mode) => database.transaction(store, mode).objectStore(store);

// Done when it is committed: a full disk is noticed no earlier.
const change = (store, act) =>
  new Promise((resolve, reject) => {
    const target = within(store, "readwrite");
    target.transaction.oncomplete = resolve;
    target.transaction.onabort = () => reject(target.transaction.error);
    act(target);
  });

// Another page of this server kept or forgot something in `store`.
export function onChange(act) {
  otherTabs.addEventListener("message", (event) => act(event.data));
}

// Returns whether it is kept beyond this page.
export async function put(store, value) {
  try {
    await change(store, (target) => target.put(value));
  } catch {
    memory[store].set(value.id, value);
    return false;
  }
  otherTabs.postMessage(store);
  return true;
}

export async function remove(store, id) {
  memory[store].delete(id);
  await attempt(() => change(store, (target) => target.delete(id)));
  otherTabs.postMessage(store);
}

export async function clear(store) {
  memory[store].clear();
  await attempt(() => change(store, (target) => target.clear()));
  otherTabs.postMessage(store);
}

// Everything in `store`, oldest first.
export async function all(store) {
  const kept = (await attempt(() => done(within(store, "readonly").getAll()))) ?? [];
  return [...kept, ...memory[store].values()].sort((one, other) => one.at - other.at);
}

async function attempt(act) {
  try {
    return await act();
  } catch {
    return null; // there is no database
  }
}

// Whether takes are played as soon as they are made: the one wish that is remembered.
export function playsAtOnce() {
  try {
    return localStorage.getItem(AUTOPLAY) !== "off";
  } catch {
    return true;
  }
}

export function setPlaysAtOnce(does) {
  try {
    localStorage.setItem(AUTOPLAY, does ? "on" : "off");
  } catch {} // the browser denies its storage
}
