// Call a server with the unmodified JavaScript client of ElevenLabs and print the results as JSON.
// Usage: elevenlabs_node.cjs <base URL> <key>

const { createHash } = require("node:crypto");
const { ElevenLabsClient, ElevenLabsError } = require("@elevenlabs/elevenlabs-js");

const [baseUrl, apiKey] = process.argv.slice(2);
const client = new ElevenLabsClient({ baseUrl, apiKey });

async function describe(stream) {
  const pieces = [];
  for await (const piece of stream) pieces.push(Buffer.from(piece));
  const content = Buffer.concat(pieces);
  return { size: content.length, pieces: pieces.length, sha256: createHash("sha256").update(content).digest("hex") };
}

async function refused(call) {
  try {
    await call();
  } catch (error) {
    if (!(error instanceof ElevenLabsError)) throw error;
    return { name: error.constructor.name, status: error.statusCode, body: error.body };
  }
  return null;
}

async function main() {
  const sounds = client.textToSoundEffects;
  const options = { durationSeconds: 1.5, loop: true, promptInfluence: 0.7, modelId: "eleven_text_to_sound_v2" };
  const music = { prompt: "slow piano", musicLengthMs: 3000, seed: 7, outputFormat: "pcm_24000" };
  const section = { negativeLocalStyles: [], durationMs: 3000, lines: [] };
  const compositionPlan = {
    positiveGlobalStyles: ["jazz"],
    negativeGlobalStyles: ["metal"],
    sections: [
      { sectionName: "Intro", positiveLocalStyles: ["piano"], ...section },
      { sectionName: "Solo", positiveLocalStyles: ["saxophone"], ...section },
    ],
  };
  const user = await client.user.get();
  const models = await client.models.list();
  const stranger = new ElevenLabsClient({ baseUrl, apiKey: "wrong", maxRetries: 0 });
  const results = {
    sound: {
      plain: await describe(await sounds.convert({ text: "a dog barks", durationSeconds: 1 })),
      full: await describe(await sounds.convert({ text: "a motor", outputFormat: "pcm_16000", ...options })),
    },
    music: {
      whole: await describe(await client.music.compose(music)),
      streamed: await describe(await client.music.stream(music)),
      planned: await describe(await client.music.compose({ compositionPlan, outputFormat: "ulaw_8000" })),
    },
    account: {
      user: user.userId,
      tier: user.subscription.tier,
      limit: user.subscription.characterLimit,
      models: models.map((model) => model.modelId),
    },
    errors: {
      long: await refused(() => sounds.convert({ text: "x", durationSeconds: 31 })),
      finetune: await refused(() => client.music.compose({ prompt: "x", finetuneId: "f" })),
      key: await refused(() => stranger.user.get()),
      "sound key": await refused(() => stranger.textToSoundEffects.convert({ text: "x" })),
    },
  };
  console.log(JSON.stringify(results));
}

main().catch((error) => {
  console.error(error);
  process.exit(1);
});
