// Stores clips and unfinished jobs in this browser (IndexedDB), so that they survive a reload. Without IndexedDB, as in
// some private windows or on a full disk, they last as long as the page.

const NAME = "stable-audio-serve";
const STORES = ["takes", "jobs"]; // "takes" holds the clips
let database = null;
const memory = { takes: new Map(), jobs: new Map() };
let otherTabs = null;
try {
  otherTabs = new BroadcastChannel(NAME);
} catch {} // the browser blocks storage

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

// Resolves at the commit, because a full disk is not reported earlier.
const change = (store, act) =>
  new Promise((resolve, reject) => {
    const target = within(store, "readwrite");
    target.transaction.oncomplete = resolve;
    target.transaction.onabort = () => reject(target.transaction.error);
    act(target);
  });

// Calls `act(store)` when another tab has changed a store.
export function onChange(act) {
  otherTabs?.addEventListener("message", (event) => act(event.data));
}

// Returns whether the value is stored beyond this page.
export async function put(store, value) {
  try {
    await change(store, (target) => target.put(value));
  } catch {
    memory[store].set(value.id, value);
    return false;
  }
  otherTabs?.postMessage(store);
  return true;
}

export async function remove(store, id) {
  memory[store].delete(id);
  await attempt(() => change(store, (target) => target.delete(id)));
  otherTabs?.postMessage(store);
}

export async function clear(store) {
  memory[store].clear();
  await attempt(() => change(store, (target) => target.clear()));
  otherTabs?.postMessage(store);
}

// Returns all values in a store, oldest first.
export async function all(store) {
  const kept = (await attempt(() => done(within(store, "readonly").getAll()))) ?? [];
  return [...kept, ...memory[store].values()].sort((one, other) => one.at - other.at);
}

async function attempt(act) {
  try {
    return await act();
  } catch {
    return null; // no database
  }
}

// Returns a stored preference, a short text.
export function preference(name, fallback) {
  try {
    return localStorage.getItem(`${NAME}.${name}`) ?? fallback;
  } catch {
    return fallback;
  }
}

export function setPreference(name, value) {
  try {
    localStorage.setItem(`${NAME}.${name}`, value);
  } catch {} // the browser blocks local storage
}
