// Texts of prompt tokens, from what vLLM's /tokenize calls `token_strs`: a tokenizer's
// own spelling, in which bytes stand for themselves or for letters.

/** GPT-2's letters for bytes: printable ones are themselves, others follow 256. */
function byteLetters() {
  const bytes = new Map();
  let next = 256;
  for (let byte = 0; byte < 256; byte++) {
    const printable =
      (byte >= 33 && byte <= 126) || (byte >= 161 && byte <= 172) || byte >= 174;
    bytes.set(String.fromCharCode(printable ? byte : next++), byte);
  }
  return bytes;
}

const BYTES = byteLetters();
const HEX_BYTE = /^<0x([0-9A-F]{2})>$/;

/** Text of each token; a character of several tokens belongs to its last. */
export function tokenTexts(strings) {
  const byLetters = strings.some((s) => /[ĠĊ]/.test(s));
  const decoder = new TextDecoder();
  return strings.map((string) => {
    const bytes = byLetters ? fromLetters(string) : fromPieces(string);
    return decoder.decode(bytes, { stream: true });
  });
}

function fromLetters(string) {
  const bytes = [...string].map((letter) => BYTES.get(letter));
  // Special tokens are spelled as they are.
  return bytes.includes(undefined)
    ? new TextEncoder().encode(string)
    : new Uint8Array(bytes);
}

function fromPieces(string) {
  const hex = HEX_BYTE.exec(string);
  if (hex) return new Uint8Array([parseInt(hex[1], 16)]);
  return new TextEncoder().encode(string.replaceAll("▁", " "));
}
