// Reads the fields of each kind of order, and their ranges, from the OpenAPI description.

const PATHS = { generate: "/v1/audio/generations", vary: "/v1/audio/variations", piece: "/jobs" };

// Returns {kind: {field: {min, max, text}}}; missing bounds are undefined.
export function readFields(document) {
  return Object.fromEntries(Object.keys(PATHS).map((kind) => [kind, fieldsOf(document, kind)]));
}

function fieldsOf(document, kind) {
  const [body] = Object.values(document.paths[PATHS[kind]]?.post?.requestBody?.content ?? {});
  const { properties = {} } = resolve(document, body?.schema ?? {});
  return Object.fromEntries(Object.entries(properties).map(([name, schema]) => [name, range(schema)]));
}

const resolve = (document, schema) => (schema.$ref ? document.components.schemas[schema.$ref.split("/").at(-1)] : schema);

function range(schema) {
  const typed = schema.anyOf?.find((each) => each.type !== "null") ?? schema;
  return { min: typed.minimum ?? typed.exclusiveMinimum, max: typed.maximum, text: schema.description };
}
