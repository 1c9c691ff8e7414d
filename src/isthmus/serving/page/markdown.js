// An answer's Markdown as elements, never as HTML: code, headings, lists and paragraphs; code, bold and italics within.
// Links and pictures stay as they were written: what a model says must not lead anywhere.

const FENCE = /^\s*```/;
const HEADING = /^#{1,6}\s+(.*)$/;
const ITEM = /^\s*(?:[-*•]|(\d+)[.)])\s+(.*)$/;
const WITHIN = /`([^`\n]+)`|\*\*(\S|\S.*?\S)\*\*|(?<![\w*])\*([^\s*]|[^\s*][^*\n]*[^\s*])\*(?![\w*])/gs;

function element(name, ...children) {
  const made = document.createElement(name);
  made.append(...children);
  return made;
}

function within(text) {
  const parts = [];
  let at = 0;
  for (const found of text.matchAll(WITHIN)) {
    const [all, code, bold, italic] = found;
    parts.push(text.slice(at, found.index));
    if (code !== undefined) parts.push(element("code", code));
    else parts.push(element(bold === undefined ? "em" : "strong", ...within(bold ?? italic)));
    at = found.index + all.length;
  }
  return [...parts, text.slice(at)];
}

// Takes lines from the front as long as they belong together.
function take(lines, belongs) {
  const end = lines.findIndex((line) => !belongs(line));
  return lines.splice(0, end < 0 ? lines.length : end);
}

function list(lines) {
  const ordered = lines[0].match(ITEM)[1];
  const made = element(ordered ? "ol" : "ul");
  if (ordered) made.start = Number(ordered);
  for (const line of take(lines, (each) => ITEM.test(each) && Boolean(each.match(ITEM)[1]) === Boolean(ordered))) {
    made.append(element("li", ...within(line.match(ITEM)[2])));
  }
  return made;
}

export function rendered(text) {
  const lines = text.split("\n");
  const blocks = [];
  while (lines.length) {
    if (FENCE.test(lines[0])) {
      lines.shift();
      const code = take(lines, (line) => !FENCE.test(line)).join("\n");
      lines.shift();
      blocks.push(element("pre", element("code", code)));
    } else if (HEADING.test(lines[0])) blocks.push(element("h3", ...within(lines.shift().match(HEADING)[1])));
    else if (ITEM.test(lines[0])) blocks.push(list(lines));
    else if (!lines[0].trim()) lines.shift();
    else {
      const plain = take(lines, (line) => line.trim() && !FENCE.test(line) && !HEADING.test(line) && !ITEM.test(line));
      blocks.push(element("p", ...within(plain.join("\n"))));
    }
  }
  return blocks;
}
