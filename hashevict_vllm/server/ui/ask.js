// One prompt under one budget: the answer streams while its cache is read beside.

import { HttpError, events, getJson, post } from "./api.js";
import { Retention } from "./retention.js";
import { tokenTexts } from "./tokens.js";

const READ_EVERY_MS = 300;

const sleep = (ms) => new Promise((done) => setTimeout(done, ms));

/** An id of our own, so that the cache can be read before the first token comes. */
function newId() {
  const bytes = crypto.getRandomValues(new Uint8Array(16));
  return Array.from(bytes, (byte) => byte.toString(16).padStart(2, "0")).join("");
}

/**
 * Send a prompt and show all that comes of it in a pane.
 *
 * @param question {model, key, kind, prompt, tokens, budget}
 * @param signal of an AbortController
 */
export async function ask(question, pane, signal) {
  const id = newId();
  const state = { done: false };
  await showPrompt(question, pane);
  const reading = readOn(question, id, pane, state);
  try {
    await stream(question, id, pane, signal);
  } catch (error) {
    if (error.name !== "AbortError") throw error;
  } finally {
    state.done = true;
    await reading;
  }
}

function input({ kind, prompt }) {
  return kind === "chat" ? { messages: [{ role: "user", content: prompt }] } : { prompt };
}

async function showPrompt(question, pane) {
  const body = { model: question.model, return_token_strs: true, ...input(question) };
  const { token_strs: strings } = await (await post("tokenize", question.key, body)).json();
  for (const text of tokenTexts(strings)) pane.add(text, 1, "prompt");
}

async function stream(question, id, pane, signal) {
  const { kind, key, model, tokens, budget } = question;
  const body = {
    model,
    ...input(question),
    max_tokens: tokens,
    temperature: 0,
    stream: true,
    return_token_ids: true,
  };
  if (budget) body.vllm_xargs = { kv_budget: budget };
  const path = kind === "chat" ? "v1/chat/completions" : "v1/completions";
  const headers = { "X-Request-Id": id };
  const response = await post(path, key, body, { signal, headers });
  let first = null;
  let count = 0;
  for await (const { choices } of events(response)) {
    const choice = choices?.[0];
    const ids = choice?.token_ids?.length ?? 0;
    if (!ids) continue;
    first ??= performance.now();
    pane.add(choice.delta?.content ?? choice.text ?? "", ids, "answer");
    const seconds = (performance.now() - first) / 1000;
    if (count) pane.set("rate", (count / seconds).toFixed(1));
    count += ids;
  }
}

/** Read the cache until the request is gone. */
async function readOn({ key, kind }, id, pane, state) {
  const prefix = kind === "chat" ? "chatcmpl" : "cmpl";
  const path = `v1/kv_policy/requests/${prefix}-${id}/retention`;
  let asked = null; // the position whose votes were asked for last
  while (!state.done) {
    let pause = READ_EVERY_MS;
    try {
      const { chosen, votes } = pane;
      if (chosen !== null && votes === null && chosen !== asked) {
        const query = `start=${chosen}&stop=${chosen + 1}&columns=1&include=slots`;
        pane.showVotes(chosen, (await getJson(`${path}?${query}`, key)).slots);
        asked = chosen; // not before: a 429 is asked again
      } else {
        const answer = await getJson(`${path}?columns=1&include=bitmap`, key);
        if (answer.tokens) pane.show(new Retention(answer));
      }
    } catch (error) {
      if (!(error instanceof HttpError)) throw error;
      if (error.status === 429) pause = error.retryAfter * 1000;
      else if (error.status !== 404) {
        pane.fail(error.message);
        return;
      } // 404: not there yet, or over; then `done` will say so
    }
    await sleep(pause);
  }
}
