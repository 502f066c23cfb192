// What test_page.py measures in the page.
window.measures = {
  /** A number of the counters. */
  count: (name) =>
    Number(document.querySelector(`[data-count="${name}"]`).textContent),

  /** Whether every answer has been read beyond its prompt. */
  decoding: () =>
    [...document.querySelectorAll(".pane")].every(
      (pane) =>
        Number(pane.querySelector('[data-count="written"]').textContent) >
        (pane.querySelectorAll(".prompt").length || Infinity),
    ),

  /** By answer and token, the share of heads that the shade stands for, or null. */
  shares: () =>
    [...document.querySelectorAll(".text")].map((text) =>
      [...text.children].map((span) =>
        span.classList.contains("read")
          ? Number(span.style.getPropertyValue("--share"))
          : null,
      ),
    ),

  /** Different colours on a canvas. */
  colours: (selector) => {
    const canvas = document.querySelector(selector);
    const { width, height } = canvas;
    const { data } = canvas.getContext("2d").getImageData(0, 0, width, height);
    return new Set(new Uint32Array(data.buffer)).size;
  },

  /** WCAG 2.2's contrast ratios of the colours that text is written with and on. */
  contrasts: () => {
    const style = getComputedStyle(document.documentElement);
    const luminance = (name) => {
      const number = parseInt(style.getPropertyValue(name).trim().slice(1), 16);
      return [16, 8, 0]
        .map((shift) => ((number >> shift) & 255) / 255)
        .map((v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4))
        .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
    };
    const pairs = [
      ["--ink", "--back"],
      ["--ink", "--held"],
      ["--faint", "--back"],
      ["--faint", "--panel"],
      ["--alert", "--panel"],
      ["--on-accent", "--accent"],
    ];
    return Object.fromEntries(
      pairs.map(([ink, back]) => {
        const [low, high] = [luminance(ink), luminance(back)].sort((a, b) => a - b);
        return [`${ink} on ${back}`, (high + 0.05) / (low + 0.05)];
      }),
    );
  },
};
