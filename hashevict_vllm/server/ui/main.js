// The form: what is asked, with which budgets, and what the server says of itself.

import { HttpError, getJson } from "./api.js";
import { ask } from "./ask.js";
import { Pane } from "./pane.js";

const CITIES = ["Lisbon", "Oslo", "Prague", "Vienna", "Dublin", "Athens", "Warsaw", "Bern"];

const $ = (id) => document.getElementById(id);
const budgets = [$("budget-0"), $("budget-1")];
let panes = [];
let running = null;
let server = null;

function exampleText() {
  const lines = [];
  for (let i = 1; i <= 60; i++)
    lines.push(
      `Fact ${i}: on day ${i} the train from ${CITIES[i % 8]} to ` +
        `${CITIES[(3 * i + 1) % 8]} carried ${100 + ((37 * i) % 400)} passengers.`,
    );
  return `${lines.join("\n")}\n\nTell the story of one of these trains.`;
}

function show(element, text) {
  element.textContent = text;
  element.hidden = !text;
}

/** Ask the server what it serves; again once a key is there. */
async function connect() {
  const key = $("key").value;
  try {
    const policy = await getJson("v1/kv_policy", key);
    const models = await getJson("v1/models", key);
    server = { model: models.data[0].id, ...policy };
  } catch (error) {
    server = null;
    show($("policy"), error.message);
    if (error instanceof HttpError && error.status === 401) $("key").focus();
    return;
  }
  const { effective } = server;
  show(
    $("policy"),
    `${server.model}: ${effective.name} (${effective.scoring}) keeps ` +
      `${effective.budget} tokens per KV head, of up to ${server.max_model_len}.`,
  );
}

function questions() {
  const common = {
    model: server.model,
    key: $("key").value,
    kind: $("kind").value,
    prompt: $("prompt").value,
    tokens: Number($("tokens").value),
  };
  const [budget, other] = budgets.map(({ value }) =>
    value === "full" ? value : Number(value) || null,
  );
  return (other ? [budget, other] : [budget]).map((b) => ({ ...common, budget: b }));
}

/** Choose in the other panes what was chosen in one; they do not answer back. */
function follow(leader, position) {
  for (const pane of panes) {
    if (pane === leader) continue;
    const { onChoose } = pane;
    pane.onChoose = () => {};
    pane.choose(position, true);
    pane.onChoose = onChoose;
  }
}

async function send() {
  if (!server) await connect();
  if (!server) return;
  show($("error"), "");
  const asked = questions();
  panes = asked.map(
    ({ budget }) => new Pane(`Budget ${budget ?? server.effective.budget}`),
  );
  for (const pane of panes) pane.onChoose = (position) => follow(pane, position);
  $("panes").replaceChildren(...panes.map((pane) => pane.root));
  running = new AbortController();
  $("send").disabled = true;
  $("stop").disabled = false;
  const { signal } = running;
  await Promise.all(
    asked.map((question, i) =>
      ask(question, panes[i], signal).catch((error) => panes[i].fail(error.message)),
    ),
  );
  $("send").disabled = false;
  $("stop").disabled = true;
}

$("ask").addEventListener("submit", (event) => {
  event.preventDefault();
  send().catch((error) => show($("error"), error.message));
});
$("stop").addEventListener("click", () => running.abort());
$("example").addEventListener("click", () => ($("prompt").value = exampleText()));
$("key").addEventListener("change", connect);

const redraw = () => panes.forEach((pane) => pane.draw());
addEventListener("resize", redraw);
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", redraw);
connect();
