// Calls a server with the unmodified JavaScript client of fal, through the server's proxy path, and prints what it saw
// as JSON. Usage: node fal_node.cjs <base URL>, with NODE_PATH naming the folder @fal-ai/client is installed in.

const { fal, ApiError, ValidationError } = require("@fal-ai/client");

const base = process.argv[2];
const APP = "fal-ai/stable-audio";
const clip = { prompt: "quick", seconds_total: 1 };

fal.config({ credentials: "id:secret", proxyUrl: { url: `${base}/api/fal/proxy`, when: "always" } });

const statuses = (updates) => [...new Set(updates.map((update) => update.status))];

async function subscribe(mode) {
  const updates = [];
  const ids = [];
  const { data, requestId } = await fal.subscribe(APP, {
    input: { ...clip, prompt: "steady" },
    mode,
    logs: true,
    pollInterval: 50,
    onEnqueue: (id) => ids.push(id),
    onQueueUpdate: (update) => updates.push(JSON.parse(JSON.stringify(update))),
  });
  const messages = (updates.at(-1).logs ?? []).map((log) => log.message);
  return { data, requestId, ids, statuses: statuses(updates), messages };
}

async function queue() {
  const { request_id: requestId, queue_position } = await fal.queue.submit(APP, {
    input: { ...clip, prompt: "steady" },
    priority: "low",
  });
  const first = await fal.queue.status(APP, { requestId, logs: true });
  const stream = await fal.queue.streamStatus(APP, { requestId, logs: true });
  const events = [];
  for await (const event of stream) events.push(event);
  const last = await fal.queue.status(APP, { requestId });
  const result = await fal.queue.result(APP, { requestId });
  return { requestId, queue_position, first: first.status, events: statuses(events), last, result };
}

async function cancel() {
  const { request_id: requestId } = await fal.queue.submit(APP, { input: { prompt: "slow" } });
  await fal.queue.cancel(APP, { requestId });
  const status = await fal.queue.subscribeToStatus(APP, { requestId, mode: "polling", pollInterval: 50 });
  return { status, result: await failure(() => fal.queue.result(APP, { requestId })) };
}

async function upload() {
  const small = new Blob([new Uint8Array(5000).fill(7)], { type: "audio/wav" });
  const check = async (blob) => {
    const response = await fetch(await fal.storage.upload(blob));
    return [response.status, response.headers.get("content-type"), (await response.arrayBuffer()).byteLength];
  };
  const withBlob = await fal.run(APP, { input: { ...clip, extra: new Blob(["x"]) } });
  return { small: await check(small), withBlob: withBlob.data };
}

async function stableAudio3() {
  const wav = Buffer.alloc(44 + 2 * 8000);
  wav.write("RIFF", 0), wav.writeUInt32LE(36 + 16000, 4), wav.write("WAVEfmt ", 8), wav.writeUInt32LE(16, 16);
  wav.writeUInt16LE(1, 20), wav.writeUInt16LE(1, 22), wav.writeUInt32LE(8000, 24), wav.writeUInt32LE(16000, 28);
  wav.writeUInt16LE(2, 32), wav.writeUInt16LE(16, 34), wav.write("data", 36), wav.writeUInt32LE(16000, 40);
  const input = { prompt: "quick", duration: 1, output_format: "wav", seed: 5 };
  const audio_url = new Blob([wav], { type: "audio/wav" });
  return {
    text: (await fal.run("fal-ai/stable-audio-3/medium/text-to-audio", { input })).data,
    variation: (await fal.subscribe("fal-ai/stable-audio-3/small/sfx/audio-to-audio", { input: { ...input, audio_url } })).data,
    invalid: await failure(() => fal.run("fal-ai/stable-audio-3/medium/text-to-audio", { input: { ...input, duration: 0 } })),
  };
}

async function failure(call) {
  try {
    await call();
  } catch (error) {
    return {
      name: error.name,
      isValidation: error instanceof ValidationError,
      isApi: error instanceof ApiError,
      status: error.status,
      body: error.body,
      requestId: error.requestId,
      isUserTimeout: error.isUserTimeout,
      stepsErrors: error instanceof ValidationError ? error.getFieldErrors("steps").length : null,
    };
  }
}

async function startTimeout() {
  const ahead = [];
  for (let i = 0; i < 2; i++) ahead.push(await fal.queue.submit(APP, { input: { prompt: "slow" } }));
  const late = await failure(() => fal.subscribe(APP, { input: clip, startTimeout: 1.1, pollInterval: 50 }));
  for (const { request_id: requestId } of ahead) await fal.queue.cancel(APP, { requestId });
  return late;
}

async function main() {
  const seen = {
    run: await fal.run(APP, { input: clip }),
    polling: await subscribe("polling"),
    streaming: await subscribe("streaming"),
    queue: await queue(),
    cancel: await cancel(),
    upload: await upload(),
    startTimeout: await startTimeout(),
    stableAudio3: await stableAudio3(),
    errors: {
      steps: await failure(() => fal.run(APP, { input: { prompt: "x", steps: 1 } })),
      queued: await failure(() => fal.subscribe(APP, { input: { prompt: "x", steps: 1001 } })),
      noInput: await failure(() => fal.run(APP, {})),
      failed: await failure(() => fal.subscribe(APP, { input: { prompt: "fail" }, pollInterval: 50 })),
      unknownApp: await failure(() => fal.run("fal-ai/fast-sdxl", { input: clip })),
      tooLate: await failure(async () => {
        const { request_id: requestId } = await fal.queue.submit(APP, { input: clip });
        await fal.queue.subscribeToStatus(APP, { requestId, mode: "polling", pollInterval: 50 });
        await fal.queue.cancel(APP, { requestId });
      }),
    },
  };
  console.log(JSON.stringify(seen));
}

main().catch((error) => {
  console.error(error);
  process.exit(1);
});
