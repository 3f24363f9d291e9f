// The page of `her-nemo chat --web`. It draws what the server says and reads no tag itself: which piece is a thought, and
// what is folded, is decided there. Text goes into the page as text, never as markup.

const $ = (id) => document.getElementById(id);
const TOKEN = "her-nemo-token";
const NAMES = { system_thinking: "Plan · developer's view", role_thinking: "Thought" };
const AUTHORS = { scene: "the scene's own", model: "model", partner: "model", person: "you", edit: "edited by you" };
const SOMEBODY = "\u0000";

let info = null; // what there is to choose from
let session = null; // the conversation, as the server last said
let busy = false; // a reply is coming in
let editing = null; // number of the turn that is being edited
let comparing = null; // {turn, sides: [candidate, candidate]}
let picked = null; // scene under choice
let unfolded = new Map(); // pieces that were opened or closed one by one, against the two switches
const open = { system_thinking: false, role_thinking: false };

function h(tag, props = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(props)) {
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (value === true) element.setAttribute(name, "");
    else if (value !== false && value != null) element.setAttribute(name, value);
  }
  element.append(...children.filter((child) => child != null));
  return element;
}

function tell(text, bad = false) {
  const line = h("p", { class: bad ? "bad" : null }, text);
  $("status").append(line);
  setTimeout(() => line.remove(), bad ? 12000 : 7000);
}

const counted = (number, thing) => `${number} ${thing}${number === 1 ? "" : "s"}`;

// ---------------------------------------------------------------- the server

async function call(verb, body) {
  const headers = { "x-her-nemo-token": sessionStorage.getItem(TOKEN) ?? "" };
  if (body) headers["content-type"] = "application/json";
  const options = { method: body ? "POST" : "GET", headers, body: body && JSON.stringify(body) };
  const response = await fetch(`/api/${verb}`, options).catch(() => {
    throw new Error("her-nemo does not answer: has it ended?");
  });
  if (response.ok) return response;
  const said = await response.json().catch(() => ({})); // no JSON: the status says enough
  const error = new Error(said.error ?? response.statusText);
  error.status = response.status;
  throw error;
}

const mark = () => ({ session: session.id, revision: session.revision });

async function change(verb, body = {}) {
  try {
    const said = await (await call(verb, { ...mark(), ...body })).json();
    take(said);
    return said;
  } catch (error) {
    await complain(error);
    return null;
  }
}

async function complain(error) {
  tell(error.message, true);
  if (error.status === 409) take(await (await call("state")).json());
}

function take(said) {
  session = said.session;
  draw();
}

/** A reply by a model: a new turn of `speaker`, or another text of turn `turn`. False where it failed. */
async function reply(speaker, turn = null, choose = true, into = null) {
  busy = true;
  draw();
  const place = into ?? coming(speaker, turn);
  let well = true;
  try {
    const response = await call("reply", { ...mark(), speaker, turn, choose });
    for await (const item of lines(response.body)) {
      if (item.pieces) {
        place.replaceChildren(...item.pieces.map((piece, index) => drawPiece(piece, `coming:${index}`)));
        if (item.dropped && !place.dataset.told) {
          place.dataset.told = "yes";
          tell(`The model is not told of the oldest ${counted(item.dropped, "exchange")}, for want of room.`);
        }
        stick();
      } else if (item.error) {
        well = false;
        tell(item.error, true);
      } else {
        session = item.session;
      }
    }
  } catch (error) {
    well = false;
    busy = false;
    await complain(error);
  }
  busy = false;
  draw();
  return well;
}

async function* lines(stream) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const parts = (rest + value).split("\n");
    rest = parts.pop();
    for (const part of parts) yield JSON.parse(part);
  }
}

// ---------------------------------------------------------------- turns

function drawPiece(piece, key) {
  if (!piece.folded) return h("span", { class: `piece ${piece.kind}` }, piece.text, " ");
  const details = h(
    "details",
    { class: `fold ${piece.kind}`, open: unfolded.get(key) ?? open[piece.kind] },
    h("summary", {}, NAMES[piece.kind]),
    h("p", {}, piece.text),
  );
  details.addEventListener("toggle", () => unfolded.set(key, details.open));
  return h("span", {}, details, " ");
}

function drawBody(number, candidate, pieces) {
  return h("div", { class: "body" }, ...pieces.map((piece, index) => drawPiece(piece, `${number}:${candidate}:${index}`)));
}

function drawTurn(turn, number) {
  const chosen = turn.candidates[turn.chosen];
  const item = h("li", { class: `turn ${turn.lead ? "lead" : "other"}`, "data-turn": number });
  item.append(h("p", { class: "who" }, h("b", {}, turn.speaker), h("span", { class: "soft" }, AUTHORS[chosen.author])));
  if (editing === number) {
    item.append(drawEditor(turn, number));
    return item;
  }
  item.append(drawBody(number, turn.chosen, chosen.pieces));
  if (turn.problem) item.append(h("p", { class: "problem" }, `${turn.problem}: not exported until it is mended or written anew.`));
  item.append(drawActs(turn, number, chosen));
  return item;
}

function drawActs(turn, number, chosen) {
  const acts = h("div", { class: "acts", role: "group", "aria-label": `Turn ${number + 1}` });
  const act = (name, does, title, enabled = true) =>
    acts.append(h("button", { type: "button", title, "data-key": `${number}:${name}`, disabled: busy || !enabled, onclick: does }, name));
  const count = turn.candidates.length;
  if (count > 1) {
    act("‹", () => change("choose", { turn: number, candidate: turn.chosen - 1 }), "The text before", turn.chosen > 0);
    acts.append(`${turn.chosen + 1} of ${count}`);
    act("›", () => change("choose", { turn: number, candidate: turn.chosen + 1 }), "The text after", turn.chosen < count - 1);
  }
  if (chosen.author !== "scene" && (turn.lead || chosen.author === "partner"))
    act("Another reply", () => reply(turn.speaker, number), "Written anew; this one stays to go back to");
  if (turn.lead && chosen.author !== "scene") {
    act("A/B", () => second(number), "A second reply beside this one: choose, and the pair is kept");
    if (count > 1) act("Compare", () => compare(number, turn.chosen, turn.chosen ? turn.chosen - 1 : 1), "Two texts side by side: choose, and the pair is kept");
  }
  act("Edit", () => startEditing(number), "Mend the text, in HER's tags");
  if (number < session.turns.length - 1) act("Back to here", () => change("rewind", { turns: number + 1 }), "Take back everything after this turn");
  return acts;
}

function startEditing(number) {
  editing = number;
  draw();
  document.querySelector(".editor textarea").focus();
}

function drawEditor(turn, number) {
  const text = h("textarea", { "aria-label": `${turn.speaker}'s turn, in HER's tags`, spellcheck: "true" });
  text.value = turn.text;
  const leave = () => {
    editing = null;
    draw();
    document.querySelector(`[data-key="${number}:Edit"]`)?.focus();
  };
  const save = async () => {
    editing = null;
    if (!(await change("edit", { turn: number, text: text.value }))) startEditing(number);
  };
  text.addEventListener("keydown", (event) => {
    if (event.key === "Escape") leave();
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) save();
  });
  const row = h("div", { class: "row" }, h("button", { type: "button", class: "primary", onclick: save }, "Save"));
  row.append(h("button", { type: "button", onclick: leave }, "Cancel"), h("span", { class: "soft" }, "Ctrl+Enter saves, Escape leaves"));
  return h("div", { class: "editor" }, text, row);
}

/** Where a reply is drawn while it comes in. */
function coming(speaker, turn) {
  if (turn != null) {
    const item = document.querySelector(`[data-turn="${turn}"]`);
    item.classList.add("coming");
    return item.querySelector(".body");
  }
  const body = h("div", { class: "body" });
  const side = speaker === session.lead ? "lead" : "other";
  $("turns").append(h("li", { class: `turn coming ${side}` }, h("p", { class: "who" }, h("b", {}, speaker)), body));
  stick(true);
  return body;
}

function stick(always = false) {
  const main = document.querySelector("main");
  if (always || main.scrollHeight - main.scrollTop - main.clientHeight < 160) main.scrollTop = main.scrollHeight;
}

// ---------------------------------------------------------------- two replies, one click

async function second(number) {
  const first = session.turns[number].chosen;
  comparing = { turn: number, sides: [first, null] };
  draw();
  const place = $("compare").querySelector("[data-coming]");
  stick(true);
  const well = await reply(session.lead, number, false, place);
  const count = session.turns[number]?.candidates.length ?? 0;
  comparing = null;
  if (well && count > 1) compare(number, first, count - 1);
  else draw();
}

function compare(number, one, other) {
  // Which stands left is drawn, so that a habit of the reader favours neither.
  comparing = { turn: number, sides: Math.random() < 0.5 ? [one, other] : [other, one] };
  draw();
  $("compare").querySelector("button")?.focus();
  stick(true);
}

function drawComparison() {
  const panel = $("compare");
  panel.hidden = comparing === null;
  if (comparing === null) return;
  const turn = session.turns[comparing.turn];
  const ready = comparing.sides[1] !== null;
  const better = async (side) => {
    const [candidate, over] = side ? [...comparing.sides].reverse() : comparing.sides;
    const said = await change("prefer", { turn: comparing.turn, candidate, over });
    if (!said) return;
    comparing = null;
    draw();
    tell(`Kept: ${counted(said.pairs, "pair")} in ${info.pairs}`);
    $("text").focus();
  };
  const neither = () => {
    comparing = null;
    draw();
    $("text").focus();
  };
  panel.onkeydown = (event) => {
    if (!ready || event.ctrlKey || event.metaKey || event.altKey) return;
    if (event.key === "a") better(0);
    if (event.key === "b") better(1);
    if (event.key === "Escape") neither();
  };
  const columns = comparing.sides.map((candidate, side) => {
    const column = h("article", {}, h("b", {}, ready ? "AB"[side] : ["The first", "The second, coming"][side]));
    const pieces = candidate === null ? [] : turn.candidates[candidate].pieces;
    const body = drawBody(comparing.turn, candidate, pieces);
    if (candidate === null) body.setAttribute("data-coming", "");
    column.append(body);
    if (ready) column.append(h("button", { type: "button", class: "primary", onclick: () => better(side) }, `${"AB"[side]} is better`));
    return column;
  });
  const head = h("p", {}, h("b", {}, `Which ${turn.speaker}?`), h("span", { class: "soft" }, "one click, or the keys A and B"), h("span", { class: "grow" }));
  head.append(h("button", { type: "button", onclick: neither, disabled: !ready }, "Neither"));
  panel.replaceChildren(head, ...columns);
}

// ---------------------------------------------------------------- the whole page

function draw() {
  if (!session) return;
  const focused = document.activeElement?.getAttribute("data-key");
  $("title").textContent = session.title;
  document.title = `${session.lead} · her_nemo chat`;
  $("welcome").hidden = true;
  $("composer").hidden = false;
  $("setting").hidden = !session.setting;
  $("setting").querySelector("p").textContent = session.setting;
  const shown = session.turns.map(drawTurn);
  if (comparing) shown[comparing.turn].hidden = true;
  $("turns").replaceChildren(...shown);
  drawComparison();
  drawComposer();
  $("plan-note").hidden = !open.system_thinking;
  if (focused) document.querySelector(`[data-key="${CSS.escape(focused)}"]`)?.focus();
}

function drawComposer() {
  const before = $("speaker").value;
  const me = session.others.includes(before) || before === session.lead ? before : null;
  const spoke = [...session.turns].reverse().map((turn) => turn.speaker);
  const people = [...spoke, ...session.others].filter((name) => name !== session.lead && session.others.includes(name));
  const own = me ?? people.find((name) => name !== "Environment") ?? people[0];
  const options = session.others.map((name) => h("option", { value: name, selected: name === own }, name));
  if (!session.others.includes("Environment")) options.push(h("option", { value: "Environment" }, "Environment"));
  options.push(h("option", { value: session.lead, selected: own === session.lead }, `${session.lead} (instead of the model)`));
  options.push(h("option", { value: SOMEBODY }, "Somebody else…"));
  $("speaker").replaceChildren(...options);
  const mine = $("speaker").value;
  const playing = mine === session.lead;
  const other = playing ? people.find((name) => name !== "Environment") ?? people[0] : mine;
  $("cast").textContent = `${info.model} plays ${session.lead}, you are ${mine}` + (info.partner ? `, ${info.partner} can play the others` : "");
  $("text").placeholder = playing ? `${session.lead}'s turn: plan, thoughts, *actions*, speech` : "Say something; *between stars* you act.";
  $("go").textContent = `Let ${session.lead} speak`;
  $("partner").textContent = `Let a model play ${other}`;
  $("partner").dataset.name = other;
  const marks = playing ? [["Plan", "<system_thinking>", "</system_thinking>"]] : [];
  marks.push(["Thought", "<role_thinking>", "</role_thinking>"], ["Action", "*", "*"]);
  $("marks").replaceChildren(...marks.map(([name, begin, end]) => h("button", { type: "button", "data-key": `mark:${name}`, onclick: () => wrap(begin, end) }, name)));
  $("stop").hidden = !busy;
  $("send").hidden = busy;
  for (const id of ["send", "go", "partner", "back", "export"]) $(id).disabled = busy || comparing !== null;
  $("back").disabled ||= session.turns.length === 0;
}

/** Puts marks around what is selected in the line that is being written. */
function wrap(begin, end) {
  const text = $("text");
  const [from, to] = [text.selectionStart, text.selectionEnd];
  text.setRangeText(begin + text.value.slice(from, to) + end, from, to, "end");
  if (from === to) text.selectionEnd = text.selectionStart -= end.length;
  text.focus();
}

async function say() {
  const text = $("text").value;
  const speaker = $("speaker").value;
  if (busy || comparing || !text.trim()) return;
  if (!(await change("say", { speaker, text }))) return;
  $("text").value = "";
  stick(true);
  if (speaker !== session.lead) await answer();
  $("text").focus();
}

async function answer() {
  if ((await reply(session.lead)) && $("ab-mode").checked) await second(session.turns.length - 1);
}

function somebody() {
  const name = $("speaker").value === SOMEBODY ? prompt("Who speaks?")?.trim() : null;
  if (name) $("speaker").append(h("option", { value: name, selected: true }, name));
  if (name && !session.others.includes(name)) session.others.push(name);
  drawComposer();
}

// ---------------------------------------------------------------- choosing a scene

function showScenes() {
  drawScenes();
  $("scenes").showModal();
  $("search").focus();
}

function drawScenes() {
  const wanted = $("search").value.trim().toLowerCase();
  const found = info.scenes.map((scene, number) => [scene, number]).filter(([scene]) =>
    !wanted || [scene.title, scene.setting, ...scene.parts.map((part) => part.name)].join("\n").toLowerCase().includes(wanted));
  $("scene-list").replaceChildren(...found.map(([scene, number]) => {
    const names = scene.parts.map((part) => part.name).join(", ");
    const pick = () => pickScene(number);
    return h("li", {}, h("button", { type: "button", "data-scene": number, "aria-current": picked === number ? "true" : null, onclick: pick }, scene.title, h("small", {}, names)));
  }));
  if (!found.length) $("scene-list").append(h("li", { class: "soft" }, "No scene has these words."));
}

function pickScene(number) {
  picked = number;
  const scene = info.scenes[number];
  drawScenes();
  document.querySelector(`[data-scene="${number}"]`)?.focus();
  $("chosen-scene").textContent = scene.setting || scene.title;
  $("character").replaceChildren(...scene.parts.map((part) => h("option", { value: part.name }, part.name)));
  $("of").textContent = scene.turns;
  $("from").max = scene.turns;
  $("begin").hidden = false;
  pickCharacter();
}

function pickCharacter() {
  const part = info.scenes[picked].parts.find((each) => each.name === $("character").value);
  $("from").value = part.begins_at;
}

async function begin(scene, character, turns) {
  try {
    comparing = editing = null;
    unfolded = new Map();
    $("speaker").replaceChildren();
    take(await (await call("begin", { scene, character, turns })).json());
    $("scenes").close();
    $("setting").open = true;
    document.querySelector("main").scrollTop = 0;
    $("text").focus();
    const last = session.turns.at(-1);
    if (last && !last.lead) await answer();
  } catch (error) {
    tell(error.message, true);
  }
}

// ---------------------------------------------------------------- wiring

function fold(kind, button) {
  button.addEventListener("click", () => {
    open[kind] = !open[kind];
    button.setAttribute("aria-pressed", String(open[kind]));
    unfolded = new Map();
    draw();
  });
}

function wire() {
  fold("role_thinking", $("fold-thoughts"));
  fold("system_thinking", $("fold-plans"));
  $("theme").onclick = () => {
    const dark = matchMedia("(prefers-color-scheme: dark)").matches;
    const now = document.documentElement.dataset.theme ?? (dark ? "dark" : "light");
    document.documentElement.dataset.theme = now === "dark" ? "light" : "dark";
  };
  $("open-scenes").onclick = showScenes;
  $("close-scenes").onclick = () => $("scenes").close();
  $("search").oninput = drawScenes;
  $("character").onchange = pickCharacter;
  $("begin").onsubmit = (event) => {
    event.preventDefault();
    begin(picked, $("character").value, $("from").valueAsNumber);
  };
  $("say").onsubmit = (event) => {
    event.preventDefault();
    say();
  };
  $("text").onkeydown = (event) => {
    if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
      event.preventDefault();
      say();
    }
  };
  document.addEventListener("keydown", (event) => {
    if (event.key === "Escape" && busy) $("stop").click();
  });
  $("speaker").onchange = somebody;
  $("stop").onclick = () => call("stop", {}).catch(complain);
  $("go").onclick = answer;
  $("partner").onclick = () => reply($("partner").dataset.name);
  $("back").onclick = () => change("rewind", { turns: session.turns.length - 1 });
  $("export").onclick = async () => {
    const said = await change("export");
    if (!said) return;
    tell(`${counted(said.samples, "sample")} in ${info.samples}`);
    for (const item of said.left_out) tell(`Turn ${item.turn + 1} left out: ${item.reason}`, true);
  };
}

async function start() {
  if (location.hash.length > 1) {
    sessionStorage.setItem(TOKEN, decodeURIComponent(location.hash.slice(1)));
    history.replaceState(null, "", location.pathname);
  }
  wire();
  try {
    info = await (await call("scenes")).json();
    take(await (await call("state")).json());
  } catch (error) {
    $("welcome").textContent = error.status === 401 ? "Open the whole address that her-nemo printed, with what follows the #." : error.message;
    return;
  }
  if (session) return;
  const only = info.scene ?? (info.scenes.length === 1 ? 0 : null);
  if (only === null) showScenes();
  else {
    const names = info.scenes[only].parts.map((part) => part.name);
    if (info.character || names.length === 1) await begin(only, info.character ?? names[0], info.turns);
    else {
      showScenes();
      pickScene(only);
    }
  }
}

start();
