// The server's routes, relative to this page: a proxy may serve all of it below a path.

const ROOT = new URL("../../", import.meta.url);

export class HttpError extends Error {
  constructor(status, message, retryAfter) {
    super(message);
    this.status = status;
    this.retryAfter = retryAfter;
  }
}

/** Ask for `path`; throws HttpError with the server's sentence. */
export async function request(path, key, options = {}) {
  const headers = { ...options.headers };
  if (key) headers.Authorization = `Bearer ${key}`;
  if (options.body) headers["Content-Type"] = "application/json";
  const response = await fetch(new URL(path, ROOT), { ...options, headers });
  if (response.ok) return response;
  throw new HttpError(
    response.status,
    await sentence(response),
    Number(response.headers.get("Retry-After")) || 1,
  );
}

export async function getJson(path, key, options) {
  return (await request(path, key, options)).json();
}

export function post(path, key, body, options = {}) {
  return request(path, key, { ...options, method: "POST", body: JSON.stringify(body) });
}

async function sentence(response) {
  if (response.status === 401) return "The server wants its API key.";
  const text = await response.text();
  try {
    const { error } = JSON.parse(text);
    return error.message ?? String(error);
  } catch {
    return `The server answered ${response.status}.`;
  }
}

/** Events of a streamed answer, parsed, until `[DONE]`. */
export async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const lines = (rest + value).split("\n");
    rest = lines.pop();
    for (const line of lines) {
      if (!line.startsWith("data: ")) continue;
      const data = line.slice(6).trim();
      if (data === "[DONE]") return;
      const event = JSON.parse(data);
      if (event.error) throw new Error(event.error.message);
      yield event;
    }
  }
}
