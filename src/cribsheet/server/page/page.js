// The page for people: choose a sheet, ask, see the answer come, where it looked, and what the sheet keeps.
const at = (id) => document.getElementById(id);
const SOURCES = 3;
let running = null; // what stops the answer that is being written
let details = null; // of the chosen sheet
let marked = []; // stretches of documents that the last answer looked at

function headers() {
  const key = at("key").value.trim();
  return { "Content-Type": "application/json", ...(key && { Authorization: `Bearer ${key}` }) };
}

async function get(path) {
  const reply = await fetch(path, { headers: headers() });
  if (reply.status === 401) at("key-field").hidden = false;
  const said = await reply.json();
  if (!reply.ok) throw new Error(said.error.message);
  return said;
}

function made(tag, text, className = "") {
  const element = document.createElement(tag);
  element.textContent = text; // never as HTML: texts come from models and documents
  if (className) element.className = className;
  return element;
}

function fail(error) {
  at("error").textContent = error.name === "AbortError" ? "" : error.message;
}

async function guarded(work) {
  at("error").textContent = "";
  try {
    await work();
  } catch (error) {
    fail(error);
  }
}

async function loadSheets() {
  const { data } = await get("v1/models");
  at("sheet").replaceChildren(...data.map((each) => made("option", each.id)));
  if (data.length) await chooseSheet();
}

async function chooseSheet() {
  marked = [];
  const name = at("sheet").value;
  details = await get(`v1/sheets/${encodeURIComponent(name)}`);
  at("about").textContent =
    `${details.corpus_tokens.toLocaleString("en")} tokens of ${details.documents.length} documents in ` +
    `${details.tokens.toLocaleString("en")} (rate ${details.rate.toFixed(1)}), for: ${details.task}`;
  const options = details.documents.map((each) => {
    const option = made("option", `${each.id} (${Math.round((100 * each.kept) / Math.max(1, each.tokens))} % kept)`);
    option.value = each.number;
    return option;
  });
  at("document").replaceChildren(...options);
  await showDocument();
}

async function showDocument() {
  const place = at("text");
  place.replaceChildren();
  if (!details.texts) {
    place.textContent = "The texts are not shown by this server, or not in this sheet.";
    return;
  }
  const name = encodeURIComponent(details.id);
  const shown = await get(`v1/sheets/${name}/documents/${at("document").value}`);
  place.append(...coloured(shown));
  place.querySelector("mark")?.scrollIntoView({ block: "nearest" });
}

// The text in pieces, each of one colour; Python counts characters, not the halves that JavaScript counts.
function coloured({ id, text, kept }) {
  const letters = Array.from(text);
  const shades = new Uint8Array(letters.length);
  for (const token of kept) shades.fill(Math.max(1, Math.round(9 * token.kept)), token.start, token.stop);
  const looked = new Uint8Array(letters.length);
  for (const source of marked) if (source.document === id) looked.fill(1, source.start, source.stop);
  const pieces = [];
  for (let from = 0, to = 0; from < letters.length; from = to) {
    while (to < letters.length && shades[to] === shades[from] && looked[to] === looked[from]) to++;
    const piece = made("span", letters.slice(from, to).join(""), shades[from] ? `heat h${shades[from]}` : "");
    if (looked[from]) {
      const mark = document.createElement("mark");
      mark.append(piece);
      pieces.push(mark);
    } else pieces.push(piece);
  }
  return pieces;
}

async function* events(reply) {
  const reader = reply.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const lines = (rest + value).split("\n");
    rest = lines.pop();
    for (const line of lines) if (line.startsWith("data: ") && line !== "data: [DONE]") yield JSON.parse(line.slice(6));
  }
}

async function ask() {
  const question = at("question").value.trim();
  if (!question || running) return;
  running = new AbortController();
  busy(true);
  at("answer").textContent = "";
  at("sources").replaceChildren();
  at("numbers").replaceChildren();
  const began = performance.now();
  let first = null;
  try {
    const reply = await fetch("v1/chat/completions", {
      method: "POST",
      headers: headers(),
      signal: running.signal,
      body: JSON.stringify({
        model: at("sheet").value,
        messages: [{ role: "user", content: question }],
        stream: true,
        stream_options: { include_usage: true },
        cribsheet: { sources: SOURCES },
      }),
    });
    if (!reply.ok) throw new Error((await reply.json()).error.message);
    for await (const event of events(reply)) {
      if (event.error) throw new Error(event.error.message);
      const [choice] = event.choices;
      if (choice?.delta.content) {
        first ??= performance.now() - began;
        at("answer").append(choice.delta.content);
      }
      if (choice?.cribsheet) await showSources(choice.cribsheet.sources);
      if (event.usage) showNumbers(event.usage, first, performance.now() - began);
    }
  } finally {
    running = null;
    busy(false);
  }
}

function busy(is) {
  at("answer").setAttribute("aria-busy", is);
  at("ask").disabled = is;
  at("stop").disabled = !is;
}

function showNumbers(usage, first, all) {
  const numbers = {
    "tokens from the sheet": usage.prompt_tokens_details.cached_tokens,
    "tokens read": usage.prompt_tokens - usage.prompt_tokens_details.cached_tokens,
    "tokens written": usage.completion_tokens,
    "first text": `${Math.round(first ?? all)} ms`,
    "in all": `${Math.round(all)} ms`,
  };
  at("numbers").replaceChildren(
    ...Object.entries(numbers).map(([name, value]) => {
      const pair = made("div", "");
      pair.append(made("dt", name), made("dd", value.toLocaleString("en")));
      return pair;
    }),
  );
}

async function showSources(sources) {
  marked = sources;
  const items = sources.map((source) => {
    const button = made("button", `${Math.round(100 * source.weight)} % ${source.document}`);
    button.type = "button";
    button.append(made("small", source.text.trim()));
    button.addEventListener("click", () => guarded(() => open(source.document)));
    const item = document.createElement("li");
    item.append(button);
    return item;
  });
  at("sources").replaceChildren(...items);
  if (sources.length) await open(sources[0].document);
}

async function open(id) {
  const found = details.documents.find((each) => each.id === id);
  if (!found) return;
  at("document").value = found.number;
  await showDocument();
}

const stop = () => running?.abort();
at("form").addEventListener("submit", (event) => {
  event.preventDefault();
  guarded(ask);
});
at("question").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    guarded(ask);
  }
});
document.addEventListener("keydown", (event) => event.key === "Escape" && stop());
at("stop").addEventListener("click", stop);
at("sheet").addEventListener("change", () => guarded(chooseSheet));
at("document").addEventListener("change", () => guarded(showDocument));
at("heat").addEventListener("change", () => at("text").classList.toggle("cold", !at("heat").checked));
at("key").addEventListener("change", () => guarded(loadSheets));
guarded(loadSheets);
