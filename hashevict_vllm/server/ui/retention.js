// One reading of a request's cache: which KV heads of which layers hold which position.

export class Retention {
  /** @param answer of GET …/retention?include=bitmap */
  constructor(answer) {
    Object.assign(this, {
      tokens: answer.tokens,
      budget: answer.budget,
      live: answer.live_slots,
      blocks: answer.blocks,
      layers: answer.layers,
      heads: answer.kv_heads,
    });
    this.rowBytes = Math.ceil((answer.stop - answer.start) / 8);
    this.bits = answer.bitmaps.map(toBytes);
    this.total = this.heads.reduce((sum, count) => sum + count, 0);
    this.byToken = new Uint16Array(this.tokens);
    for (let row = 0; row < this.layers.length; row++)
      for (let head = 0; head < this.heads[row]; head++) this.#count(row, head);
  }

  #count(row, head) {
    const bits = this.bits[row];
    const start = head * this.rowBytes;
    for (let byte = 0; byte < this.rowBytes; byte++) {
      const value = bits[start + byte];
      for (let bit = 0; value && bit < 8; bit++)
        if (value & (128 >> bit)) this.byToken[byte * 8 + bit]++;
    }
  }

  /** Whether a head of the layer in row `row` holds a position. */
  holds(row, head, position) {
    const byte = this.bits[row][head * this.rowBytes + (position >> 3)];
    return (byte & (128 >> (position & 7))) !== 0;
  }

  /** Heads of the layer in row `row` that hold a position. */
  headsOf(row, position) {
    const held = [];
    for (let head = 0; head < this.heads[row]; head++)
      if (this.holds(row, head, position)) held.push(head);
    return held;
  }

  /** Share of all heads that hold the positions [first, first + count), on average. */
  share(first, count) {
    let sum = 0;
    for (let i = first; i < first + count; i++) sum += this.byToken[i];
    return sum / (count * this.total);
  }
}

function toBytes(base64) {
  return Uint8Array.from(atob(base64), (letter) => letter.charCodeAt(0));
}
