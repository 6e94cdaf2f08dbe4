// Reads the fields of each kind of order, and their ranges, from the OpenAPI description.

const PATHS = { generate: "/v1/audio/generations", vary: "/v1/audio/variations", loop: "/generate/loop", piece: "/jobs" };

// Names of form fields that differ from the route's.
const NAMES = { loop: { init_noise_level: "style_strength", model: "finetune_repo", audio: "audio_file" } };

// Returns the form field for a field name in an error.
export const formName = (name) =>
  Object.values(NAMES)
    .flatMap(Object.entries)
    .find(([, other]) => other === name)?.[0] ?? name;

// Returns {kind: {field: {min, max, text}}}; missing bounds are undefined.
export function readFields(document) {
  return Object.fromEntries(Object.keys(PATHS).map((kind) => [kind, fieldsOf(document, kind)]));
}

function fieldsOf(document, kind) {
  const [body] = Object.values(document.paths[PATHS[kind]]?.post?.requestBody?.content ?? {});
  const { properties = {} } = resolve(document, body?.schema ?? {});
  const ours = Object.fromEntries(Object.entries(NAMES[kind] ?? {}).map(([name, other]) => [other, name]));
  return Object.fromEntries(Object.entries(properties).map(([name, schema]) => [ours[name] ?? name, range(schema)]));
}

const resolve = (document, schema) => (schema.$ref ? document.components.schemas[schema.$ref.split("/").at(-1)] : schema);

function range(schema) {
  const typed = schema.anyOf?.find((each) => each.type !== "null") ?? schema;
  return { min: typed.minimum ?? typed.exclusiveMinimum, max: typed.maximum, text: schema.description };
}
