// Writes ZIP archives without compression: audio hardly gets smaller, and the files need not be in memory at once.

const TABLE = Uint32Array.from({ length: 256 }, (_, byte) => {
  let value = byte;
  for (let bit = 0; bit < 8; bit++) value = value & 1 ? (value >>> 1) ^ 0xedb88320 : value >>> 1;
  return value;
});
const UTF8 = 0x0800; // flag: names are UTF-8
const MOST_BYTES = 0xffffffff; // larger archives need another format

// Returns an archive of [{name, blob}]. Files of the same name get a number. Throws Error above 4 GB.
export async function zipBlob(files) {
  const parts = [];
  const directory = [];
  let at = 0;
  for (const { name, blob } of distinct(files)) {
    const bytes = new TextEncoder().encode(name);
    const facts = { crc: await crc32(blob), size: blob.size, bytes, at };
    const head = header(facts);
    parts.push(head, bytes, blob);
    directory.push(entry(facts), bytes);
    at += head.byteLength + bytes.length + blob.size;
  }
  const size = directory.reduce((sum, part) => sum + part.byteLength, 0);
  if (at + size > MOST_BYTES) throw new Error("The clips are too large for a ZIP. Choose fewer.");
  return new Blob([...parts, ...directory, ending(files.length, size, at)], { type: "application/zip" });
}

function distinct(files) {
  const used = new Set();
  return files.map(({ name, blob }) => {
    const [, stem, extension] = /^(.*?)(\.\w+)?$/s.exec(name);
    let free = name;
    for (let number = 2; used.has(free); number++) free = `${stem}-${number}${extension ?? ""}`;
    used.add(free);
    return { name: free, blob };
  });
}

async function crc32(blob) {
  let value = 0xffffffff;
  const reader = blob.stream().getReader();
  for (;;) {
    const { done, value: bytes } = await reader.read();
    if (done) return (value ^ 0xffffffff) >>> 0;
    for (const byte of bytes) value = TABLE[(value ^ byte) & 0xff] ^ (value >>> 8);
  }
}

// Returns little-endian numbers of 2 bytes, or of 4 bytes if given as [number].
function numbers(...values) {
  const view = new DataView(new ArrayBuffer(values.reduce((sum, value) => sum + (Array.isArray(value) ? 4 : 2), 0)));
  let at = 0;
  for (const value of values) {
    if (Array.isArray(value)) view.setUint32(at, value[0], true);
    else view.setUint16(at, value, true);
    at += Array.isArray(value) ? 4 : 2;
  }
  return view.buffer;
}

const DATE = [0, 0x21]; // 1 January 1980, the earliest
const common = ({ crc, size, bytes }) => [20, UTF8, 0, ...DATE, [crc], [size], [size], bytes.length, 0];
const header = (facts) => numbers([0x04034b50], ...common(facts));
const entry = (facts) => numbers([0x02014b50], 20, ...common(facts), 0, 0, 0, [0], [facts.at]);
const ending = (count, size, at) => numbers([0x06054b50], 0, 0, count, count, [size], [at], 0);
