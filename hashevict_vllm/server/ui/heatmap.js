// Drawings: layers × positions, and layers × heads of one token.

/** A colour of the style sheet as [r, g, b]. */
function colour(name) {
  const text = getComputedStyle(document.documentElement).getPropertyValue(name);
  const number = parseInt(text.trim().slice(1), 16);
  return [(number >> 16) & 255, (number >> 8) & 255, number & 255];
}

const LEAST = 0.2; // of the colour, so that one head of many is seen

/** Paint `cells(x, y)` in [0, 1], or null for nothing, onto a canvas. */
function paint(canvas, columns, rows, cells) {
  const from = colour("--back");
  const to = colour("--held");
  const none = colour("--panel");
  canvas.width = Math.max(columns, 1);
  canvas.height = Math.max(rows, 1);
  const image = new ImageData(canvas.width, canvas.height);
  for (let y = 0; y < rows; y++)
    for (let x = 0; x < columns; x++) {
      const share = cells(x, y);
      const shade = share ? LEAST + (1 - LEAST) * share : 0;
      const at = 4 * (y * columns + x);
      for (let i = 0; i < 3; i++)
        image.data[at + i] =
          share === null ? none[i] : from[i] + shade * (to[i] - from[i]);
      image.data[at + 3] = 255;
    }
  canvas.getContext("2d").putImageData(image, 0, 0);
}

/** Layers × positions; returns the positions of a column. */
export function drawMap(canvas, retention, chosen) {
  const { tokens, layers, heads } = retention;
  const most = Math.max(1, Math.floor(canvas.clientWidth));
  const width = Math.max(1, Math.ceil(tokens / most));
  const columns = Math.ceil(tokens / width);
  paint(canvas, columns, layers.length, (x, y) => {
    const end = Math.min((x + 1) * width, tokens);
    let held = 0;
    for (let position = x * width; position < end; position++)
      held += retention.headsOf(y, position).length;
    return held / (heads[y] * (end - x * width));
  });
  if (chosen !== null && chosen < tokens) {
    const context = canvas.getContext("2d");
    context.fillStyle = `rgb(${colour("--mark")})`;
    context.fillRect(Math.floor(chosen / width), 0, 1, layers.length);
  }
  return width;
}

/** Layers (across) × heads (down) of one position. */
export function drawHeads(canvas, retention, position) {
  const { layers, heads } = retention;
  paint(canvas, layers.length, Math.max(...heads), (x, y) =>
    y >= heads[x] ? null : Number(retention.holds(x, y, position)),
  );
  canvas.style.width = `${layers.length * 12}px`;
  canvas.style.height = `${Math.max(...heads) * 12}px`;
}
