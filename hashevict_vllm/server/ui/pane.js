// One answer on the page: its text, heat map, counters and chosen token.

import { drawHeads, drawMap } from "./heatmap.js";

const STEPS = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -10, ArrowDown: 10 };
const SHADES = 20; // spans are touched when their shade changes, not at every reading

export class Pane {
  constructor(title) {
    const template = document.getElementById("pane");
    this.root = template.content.cloneNode(true).firstElementChild;
    this.root.querySelector("h2").textContent = title;
    this.text = this.root.querySelector(".text");
    this.map = this.root.querySelector(".map");
    this.units = []; // what was written: {first, count, span, shade}
    this.length = 0; // positions that have a unit
    this.lastKind = null; // of the unit added last
    this.retention = null;
    this.chosen = null;
    this.votes = null; // of the chosen token, while the request lives
    this.onChoose = () => {}; // so that the panes can follow each other
    this.#listen();
  }

  // -- text ---------------------------------------------------------------------

  /** Add a piece of text that `count` tokens stand for. */
  add(text, count, kind) {
    const span = document.createElement("span");
    span.className = kind;
    span.textContent = text;
    span.dataset.unit = this.units.length;
    this.units.push({ first: this.length, count, span, shade: null });
    this.length += count;
    const atEnd =
      this.text.scrollTop + this.text.clientHeight > this.text.scrollHeight - 40;
    // To the answer when it begins, unless somebody looks at the prompt.
    const begins = this.lastKind !== kind && this.chosen === null;
    this.lastKind = kind;
    this.text.append(span);
    if (kind === "answer" && (atEnd || begins))
      this.text.scrollTop = this.text.scrollHeight;
  }

  // -- what was read ------------------------------------------------------------

  /** Show a new reading. */
  show(retention) {
    this.retention = retention;
    for (const unit of this.units) this.#shade(unit);
    this.set("kept", retention.live);
    this.set("evicted", Math.max(0, retention.tokens - retention.live));
    this.set("blocks", retention.blocks);
    this.set("written", retention.tokens);
    this.set("end", retention.tokens);
    if (retention.layers.length)
      this.set("layers", `${retention.layers[0]} to ${retention.layers.at(-1)}`);
    this.draw();
  }

  set(name, value) {
    this.root.querySelector(`[data-count="${name}"]`).textContent = value;
  }

  fail(message) {
    const element = this.root.querySelector(".error");
    element.textContent = message;
    element.hidden = false;
  }

  #shade(unit) {
    const { retention } = this;
    const last = unit.first + unit.count;
    if (last > retention.tokens) return;
    const share = retention.share(unit.first, unit.count);
    const shade = Math.ceil(share * SHADES);
    if (shade === unit.shade) return;
    unit.shade = shade;
    unit.span.style.setProperty("--share", shade / SHADES);
    unit.span.classList.add("read");
    // A space that is struck out looks like a hyphen.
    unit.span.classList.toggle("gone", share === 0 && unit.span.textContent.trim() !== "");
  }

  /** Paint the map and the chosen token; also after a change of size or colours. */
  draw() {
    if (!this.retention || !this.retention.layers.length) return;
    this.columnWidth = drawMap(this.map, this.retention, this.chosen);
    this.#describe();
  }

  // -- the chosen token ---------------------------------------------------------

  choose(position, scroll = false) {
    const end = Math.min(this.length, this.retention?.tokens ?? this.length);
    if (!end) return;
    position = Math.max(0, Math.min(position, end - 1));
    if (position === this.chosen) return;
    this.#unit()?.span.classList.remove("chosen");
    this.chosen = position;
    this.votes = null;
    const unit = this.#unit();
    unit.span.classList.add("chosen");
    if (scroll) unit.span.scrollIntoView({ block: "nearest" });
    this.draw();
    this.onChoose(position);
  }

  /** Votes of the chosen token, as the server lists them. */
  showVotes(position, slots) {
    if (position !== this.chosen) return;
    this.votes = new Map(
      slots
        .filter((slot) => slot.votes?.length)
        .map((slot) => [`${slot.layer} ${slot.head}`, slot.votes[0]]),
    );
    this.#describe();
  }

  /** The unit of the chosen position, by halving: units are in order. */
  #unit() {
    if (this.chosen === null) return undefined;
    let [low, high] = [0, this.units.length - 1];
    while (low < high) {
      const middle = (low + high + 1) >> 1;
      if (this.units[middle].first <= this.chosen) low = middle;
      else high = middle - 1;
    }
    return this.units[low];
  }

  #describe() {
    const { retention, chosen } = this;
    if (chosen === null || !retention || chosen >= retention.tokens) return;
    const held = retention.byToken[chosen];
    const text = JSON.stringify(this.#unit().span.textContent);
    this.root.querySelector(".said").textContent =
      `${text}, position ${chosen}: held by ${held} of ${retention.total} heads` +
      (this.votes?.size ? `, with up to ${this.#mostVotes()} votes.` : ".");
    const canvas = this.root.querySelector(".heads");
    canvas.hidden = this.root.querySelector(".heads-of").hidden = false;
    drawHeads(canvas, retention, chosen);
    this.#list();
  }

  #mostVotes() {
    return Math.max(...this.votes.values()).toPrecision(3);
  }

  #list() {
    const { retention, chosen } = this;
    const details = this.root.querySelector("details");
    details.hidden = false;
    const items = retention.layers.map((layer, row) => {
      const heads = retention.headsOf(row, chosen).map((head) => {
        const votes = this.votes?.get(`${layer} ${head}`);
        return votes === undefined ? `${head}` : `${head} (${votes.toPrecision(3)})`;
      });
      const item = document.createElement("li");
      item.textContent = `layer ${layer}: ${heads.length ? `heads ${heads.join(", ")}` : "none"}`;
      return item;
    });
    details.querySelector("ul").replaceChildren(...items);
  }

  #listen() {
    for (const kind of ["pointerover", "click"])
      this.text.addEventListener(kind, (event) => {
        const unit = this.units[event.target.dataset?.unit];
        if (unit) this.choose(unit.first);
      });
    for (const kind of ["pointermove", "click"])
      this.map.addEventListener(kind, (event) => {
        if (!this.columnWidth) return;
        const column = Math.floor(
          (event.offsetX / this.map.clientWidth) * this.map.width,
        );
        this.choose(column * this.columnWidth, kind === "click");
      });
    for (const element of [this.text, this.map])
      element.addEventListener("keydown", (event) => this.#press(event));
  }

  #press(event) {
    let to;
    if (event.key in STEPS) to = (this.chosen ?? -1) + STEPS[event.key];
    else if (event.key === "Home") to = 0;
    else if (event.key === "End") to = Infinity;
    else return;
    event.preventDefault();
    this.choose(to, true);
  }
}
