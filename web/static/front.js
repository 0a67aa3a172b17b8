// The front page: submits over HTTP, and hears of results over one WebSocket.
"use strict";

const COUNT = 64;
const REFRESH_MS = 5000;

// Why a batch left, in words.
const REASONS = {
  full: "it was full",
  window: "its window was over",
  idle: "nobody else was expected",
  deadline: "a deadline was near",
  isolated: "it was part of a failed batch",
};

// -- Elements -----------------------------------------------------------------------------------

// Everything that comes from models or clients is set as text, never as markup.
function element(tag, properties = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name === "class") made.className = value;
    else if (name.startsWith("data-")) made.setAttribute(name, value);
    else made[name] = value;
  }
  made.append(...children);
  return made;
}

function announce(text) {
  document.getElementById("announcer").textContent = text;
}

const number = (value, digits = 1) => value.toLocaleString("en", {
  minimumFractionDigits: digits, maximumFractionDigits: digits,
});

// -- The socket ---------------------------------------------------------------------------------

// One for the page. After a loss it comes back and asks again for whatever is still awaited.
class Results {
  constructor() {
    this.waiting = new Map();   // task id -> callback
    this.accepting = new Map(); // our reference -> [callback of the acceptance, the message]
    this.references = 0;
    this.delay = 250;
  }

  wait(taskId, arrived) {
    this.waiting.set(taskId, arrived);
    this.say({ type: "subscribe", task_id: taskId });
  }

  submit(body, accepted) {
    const id = ++this.references;
    const message = { type: "submit", id, ...body };
    this.accepting.set(id, [accepted, message]);
    this.say(message);
  }

  say(message) {
    if (this.socket?.readyState === WebSocket.OPEN) this.socket.send(JSON.stringify(message));
    else this.open();
  }

  open() {
    if (this.socket && this.socket.readyState <= WebSocket.OPEN) return;
    const scheme = location.protocol === "https:" ? "wss:" : "ws:";
    this.socket = new WebSocket(`${scheme}//${location.host}/ws`);
    this.show("connecting");
    this.socket.onopen = () => {
      this.delay = 250;
      this.show("live");
      for (const [, message] of this.accepting.values()) this.socket.send(JSON.stringify(message));
      const ids = [...this.waiting.keys()];
      if (ids.length) this.socket.send(JSON.stringify({ type: "subscribe", task_ids: ids }));
    };
    this.socket.onmessage = (event) => this.hear(JSON.parse(event.data));
    this.socket.onclose = () => {
      this.show("lost");
      if (!this.waiting.size && !this.accepting.size) return;
      setTimeout(() => this.open(), this.delay);
      this.delay = Math.min(2 * this.delay, 5000);
    };
  }

  hear({ type, id, task_id: taskId, data }) {
    if (taskId !== undefined) {
      const arrived = this.waiting.get(taskId);
      this.waiting.delete(taskId);
      arrived?.(type, data);
    } else if (this.accepting.has(id)) {
      const [accepted] = this.accepting.get(id);
      this.accepting.delete(id);
      accepted(type, data, (arrived) => this.waiting.set(data.task_id, arrived));
    }
  }

  show(state) {
    document.getElementById("connection").textContent = state;
  }
}

const results = new Results();

// -- What a form says ---------------------------------------------------------------------------

async function bodyOf(card) {
  const inputs = {};
  for (const field of card.querySelectorAll(".field:not([hidden])")) {
    const value = await valueOf(field);
    if (value !== undefined) inputs[field.dataset.input] = value;
  }
  const body = { model: card.dataset.model, inputs };
  const version = card.querySelector(".version select");
  if (version) body.version = Number(version.value);
  return body;
}

async function valueOf(field) {
  const name = field.dataset.input;
  if (field.dataset.kind === "image") {
    const file = field.querySelector("input").files[0];
    if (file) return base64(file);
    const canvas = field.querySelector("canvas");
    if (canvas?.dataset.drawn) {
      return base64(await new Promise((done) => canvas.toBlob(done, "image/png")));
    }
    throw new Error(canvas ? "Draw a digit or choose a picture first." : "Choose a picture first.");
  }
  const text = field.querySelector("textarea").value;
  if (field.dataset.kind === "text") return text === "" ? undefined : text;
  if (text.trim() === "") return undefined;
  try {
    return JSON.parse(text);
  } catch (error) {
    throw new Error(`${name} is not valid JSON: ${error.message}`);
  }
}

function base64(blob) {
  return new Promise((done, failed) => {
    const reader = new FileReader();
    reader.onload = () => done(reader.result.slice(reader.result.indexOf(",") + 1));
    reader.onerror = () => failed(reader.error);
    reader.readAsDataURL(blob);
  });
}

// -- One task -----------------------------------------------------------------------------------

async function run(card) {
  const area = card.querySelector(".result");
  const pill = element("span", { class: "pill", "data-state": "queued" }, "sending");
  const status = element("p", { class: "status" }, pill);
  area.replaceChildren(status);
  area.hidden = false;
  try {
    const body = await bodyOf(card);
    const answer = await fetch("/infer", { method: "POST", body: JSON.stringify(body) });
    const data = await answer.json();
    if (!answer.ok) throw new Error(data.detail ?? data.title);
    pill.textContent = "queued";
    status.append(taskLink(data.task_id));
    if (card.querySelector(".state").dataset.ready !== "yes") {
      status.after(element("p", { class: "ride" },
        `No worker serves ${data.model} yet; the task waits. Start one: inferno worker ${data.model}`));
    }
    announce(`${card.dataset.model}: queued`);
    results.wait(data.task_id, (type, task) => {
      if (!status.isConnected) return; // a later run has taken the place
      finish(card, status, pill, type, task);
    });
  } catch (error) {
    fail(card, pill, status, error.message);
  }
}

function finish(card, status, pill, type, task) {
  if (type !== "result") {
    fail(card, pill, status, task.error?.detail ?? task.detail);
    return;
  }
  pill.dataset.state = "succeeded";
  pill.textContent = "✓ done";
  const answer = element("div", { class: "answer" });
  const spoken = render(answer, card, task);
  status.after(answer, ...timings(task.timings), ride(task));
  announce(`${card.dataset.model}: ${spoken}`);
}

function fail(card, pill, status, text) {
  pill.dataset.state = "failed";
  pill.textContent = "✗ failed";
  status.after(element("div", { class: "answer error" }, text));
  announce(`${card.dataset.model} failed: ${text}`);
}

function taskLink(taskId) {
  return element("a", { href: `/tasks/${encodeURIComponent(taskId)}` }, taskId);
}

// -- Outputs by what the model is for -----------------------------------------------------------

// Fills the area and returns what is said to those who listen.
function render(area, card, task) {
  const { outputs } = task;
  const labels = JSON.parse(card.dataset.labels);
  if (card.dataset.task === "classification" && labels.length) {
    const scores = Object.values(outputs).find((o) => o.data?.[0]?.length === labels.length);
    if (scores) return classification(area, labels, scores.data[0]);
  }
  if (card.dataset.task === "embedding") {
    const vector = Object.values(outputs).find((output) => Array.isArray(output.data?.[0]));
    if (vector) return embedding(area, vector.data[0]);
  }
  for (const [name, output] of Object.entries(outputs)) {
    area.append(element("div", { class: "output-name" }, name), element("div", {}, plain(output)));
  }
  return plain(Object.values(outputs)[0] ?? {});
}

function classification(area, labels, scores) {
  const ranked = scores.map((score, n) => [score, labels[n]]).sort(([a], [b]) => b - a);
  const bars = element("div", { class: "bars" });
  ranked.slice(0, 5).forEach(([score, label], place) => {
    const bar = element("div", { class: place ? "bar" : "bar best" });
    bar.style.width = `${Math.max(0, Math.min(100, 100 * score))}%`;
    bars.append(
      element("span", { class: place ? "" : "top-label" }, label),
      element("div", { class: "track" }, bar),
      element("span", {}, `${number(100 * score)} %`),
    );
  });
  const [best, label] = ranked[0];
  area.append(element("div", { class: "verdict" }, label), bars);
  return `${label}, ${number(100 * best, 0)} percent`;
}

function embedding(area, vector) {
  const first = vector.slice(0, 6).map((value) => number(value, 3)).join(", ");
  area.append(
    element("div", { class: "verdict" }, `${vector.length} dimensions`),
    plot(vector.slice(0, 96)),
    element("div", { class: "code" }, `[${first}, …]`),
  );
  return `an embedding of ${vector.length} dimensions`;
}

function plot(values) {
  const space = "http://www.w3.org/2000/svg";
  const picture = document.createElementNS(space, "svg");
  picture.setAttribute("viewBox", `0 -1 ${values.length} 2`);
  picture.setAttribute("preserveAspectRatio", "none");
  picture.setAttribute("class", "plot");
  picture.setAttribute("aria-hidden", "true");
  const largest = Math.max(...values.map(Math.abs)) || 1;
  values.forEach((value, n) => {
    const bar = document.createElementNS(space, "rect");
    const height = Math.abs(value) / largest;
    bar.setAttribute("x", n + 0.15);
    bar.setAttribute("width", 0.7);
    bar.setAttribute("y", value > 0 ? -height : 0);
    bar.setAttribute("height", height);
    picture.append(bar);
  });
  return picture;
}

function plain(output) {
  const value = output.data ?? output.base64 ?? output;
  const text = Array.isArray(value) && value.every((item) => typeof item === "string")
    ? value.join("\n") : JSON.stringify(value);
  return text.length > 1500 ? `${text.slice(0, 1500)}…` : text;
}

// -- Where the time went ------------------------------------------------------------------------

const PHASES = [
  ["queue", "queue_ms", "queue"],
  ["wait", "batch_wait_ms", "batch wait"],
  ["inference", "inference_ms", "inference"],
];

function timings(times) {
  const line = element("div", { class: "timeline", ariaHidden: "true" });
  const legend = element("ul", { class: "legend" });
  for (const [name, key, words] of PHASES) {
    const part = element("div", { class: name });
    part.style.flexGrow = Math.max(times[key], 0.001);
    line.append(part);
    legend.append(element("li", {},
      element("i", { class: name, ariaHidden: "true" }), `${words} ${number(times[key])} ms`));
  }
  legend.append(element("li", {}, `total ${number(times.total_ms)} ms`));
  return [line, legend];
}

function ride(task) {
  const { size, rows, flush_reason: reason } = task.batch;
  const many = rows === size ? "" : ` (${rows} rows)`;
  return element("p", { class: "ride" },
    `Rode in a batch of ${size}${many}, which left because ${REASONS[reason] ?? reason}. `
    + `Worker ${task.worker}, version ${task.version}.`);
}

// -- Many at once -------------------------------------------------------------------------------

async function runMany(card) {
  const area = card.querySelector(".result");
  const pill = element("span", { class: "pill", "data-state": "queued" }, "sending");
  const status = element("p", { class: "status" }, pill);
  const dots = Array.from({ length: COUNT }, () => element("i"));
  const swarm = element("div", { class: "swarm", ariaHidden: "true" }, ...dots);
  const list = element("ul", { class: "batches" });
  list.setAttribute("aria-label", "Sizes of the batches");
  const reasons = element("p", { class: "ride" });
  area.replaceChildren(status);
  area.hidden = false;
  let body;
  try {
    body = await bodyOf(card);
  } catch (error) {
    fail(card, pill, status, error.message);
    return;
  }
  area.append(swarm, list, reasons);
  announce(`${card.dataset.model}: ${COUNT} tasks sent`);
  const batches = new Map(); // id -> {count, size, reason}
  const began = performance.now();
  let done = 0;
  let refused = null;
  const settle = (dot, type, task) => {
    if (!status.isConnected) return;
    done += 1;
    if (type === "result") {
      dot.dataset.done = "";
      const batch = batches.get(task.batch.id) ?? { count: 0, ...task.batch };
      batch.count += 1;
      batches.set(task.batch.id, batch);
    } else {
      dot.dataset.failed = "";
      refused ??= task.error?.detail ?? task.detail;
    }
    pill.textContent = `${done} of ${COUNT}`;
    if (done === COUNT) finishMany(card, pill, status, batches, performance.now() - began, refused);
    list.replaceChildren(...[...batches.values()].map(batchBlock));
    reasons.textContent = whyTheyLeft([...batches.values()]);
  };
  for (const dot of dots) {
    results.submit(body, (type, data, wait) => {
      if (type === "accepted") wait((kind, task) => settle(dot, kind, task));
      else settle(dot, type, data);
    });
  }
}

function finishMany(card, pill, status, batches, milliseconds, refused) {
  const failed = refused !== null;
  pill.dataset.state = failed ? "failed" : "succeeded";
  pill.textContent = failed ? "✗ some failed" : "✓ done";
  const rate = Math.round((1000 * COUNT) / milliseconds);
  const count = batches.size;
  const text = `${COUNT} tasks rode in ${count} ${count === 1 ? "batch" : "batches"}: `
    + `${number(milliseconds, 0)} ms, ${rate} a second`;
  status.append(element("span", {}, text));
  if (failed) status.after(element("div", { class: "answer error" }, refused));
  announce(`${card.dataset.model}: ${text}`);
}

function batchBlock({ size, flush_reason: reason }) {
  const block = element("li", { title: `left because ${REASONS[reason] ?? reason}` }, String(size));
  block.style.width = `${Math.min(100, (90 * size) / COUNT)}%`;
  return block;
}

function whyTheyLeft(batches) {
  const counts = new Map();
  for (const { flush_reason: reason } of batches) counts.set(reason, (counts.get(reason) ?? 0) + 1);
  const told = [...counts].map(([reason, count]) => `${count} because ${REASONS[reason] ?? reason}`);
  return `They left: ${told.join(", ")}.`;
}

// -- The same request elsewhere -----------------------------------------------------------------

async function copyCurl(card) {
  const area = card.querySelector(".result");
  try {
    const json = JSON.stringify(await bodyOf(card)).replaceAll("'", "'\\''");
    const command = `curl -s -H 'Prefer: wait=30' ${location.origin}/infer -d '${json}'`;
    area.querySelector(".curl")?.remove();
    const text = element("textarea", { class: "curl", readOnly: true, rows: 3, value: command });
    text.setAttribute("aria-label", "The request as a curl command");
    area.append(text);
    area.hidden = false;
    text.select();
    // Only secure pages may write to the clipboard; elsewhere the text is there to be copied.
    await navigator.clipboard?.writeText(command);
    announce("The curl command was copied");
  } catch (error) {
    announce(error.message);
    if (!area.querySelector(".curl")) {
      area.replaceChildren(element("div", { class: "answer error" }, error.message));
      area.hidden = false;
    }
  }
}

// -- Pictures -----------------------------------------------------------------------------------

function prepareImage(field) {
  const chooser = field.querySelector("input[type=file]");
  const preview = field.querySelector(".preview");
  const canvas = field.querySelector("canvas");
  chooser.addEventListener("change", () => {
    const [file] = chooser.files;
    if (preview.src) URL.revokeObjectURL(preview.src);
    preview.hidden = !file;
    if (file) preview.src = URL.createObjectURL(file);
  });
  if (!canvas) return;
  const pen = canvas.getContext("2d");
  const unchoose = () => {
    chooser.value = "";
    preview.hidden = true;
  };
  const clear = () => {
    pen.fillStyle = "#fff";
    pen.fillRect(0, 0, canvas.width, canvas.height);
    delete canvas.dataset.drawn;
    unchoose();
  };
  const point = (event) => {
    const box = canvas.getBoundingClientRect();
    return [
      ((event.clientX - box.left) * canvas.width) / box.width,
      ((event.clientY - box.top) * canvas.height) / box.height,
    ];
  };
  canvas.addEventListener("pointerdown", (event) => {
    unchoose();
    canvas.setPointerCapture(event.pointerId);
    canvas.dataset.drawn = "yes";
    pen.lineWidth = 20;
    pen.lineCap = pen.lineJoin = "round";
    pen.strokeStyle = "#111";
    pen.beginPath();
    pen.moveTo(...point(event));
    pen.lineTo(...point(event));
    pen.stroke();
  });
  canvas.addEventListener("pointermove", (event) => {
    if (!canvas.hasPointerCapture(event.pointerId)) return;
    pen.lineTo(...point(event));
    pen.stroke();
  });
  field.querySelector("[data-do=clear]").addEventListener("click", clear);
  field.querySelector("[data-do=sample]").addEventListener("click", () => {
    clear();
    const digit = String(Math.floor(10 * Math.random()));
    pen.fillStyle = "#111";
    pen.font = "190px sans-serif";
    pen.textAlign = "center";
    pen.textBaseline = "middle";
    pen.fillText(digit, canvas.width / 2, canvas.height / 2 + 10);
    canvas.dataset.drawn = "yes";
    announce(`A ${digit} was drawn`);
  });
  clear();
}

// -- The page -----------------------------------------------------------------------------------

for (const card of document.querySelectorAll(".card")) {
  card.querySelector("form").addEventListener("submit", (event) => {
    event.preventDefault();
    run(card);
  });
  card.querySelector("[data-do=many]").addEventListener("click", () => runMany(card));
  card.querySelector("[data-do=curl]").addEventListener("click", () => copyCurl(card));
  card.querySelectorAll(".field[data-kind=image]").forEach(prepareImage);
  const choose = () => {
    const chosen = card.querySelector(".choice input:checked")?.value;
    const names = [...card.querySelectorAll(".choice input")].map((input) => input.value);
    for (const field of card.querySelectorAll(".field")) {
      const { input } = field.dataset;
      field.hidden = names.includes(input) && input !== chosen;
    }
  };
  card.querySelector(".choice")?.addEventListener("change", choose);
  choose(); // browsers restore the choice of an earlier visit
}

async function refresh() {
  if (document.hidden) return;
  try {
    const health = await (await fetch("/health")).json();
    const models = health.models ?? {};
    for (const card of document.querySelectorAll(".card")) {
      const ready = Boolean(models[card.dataset.model]);
      const state = card.querySelector(".state");
      state.dataset.ready = ready ? "yes" : "no";
      state.querySelector(".glyph").textContent = ready ? "●" : "○";
      state.querySelector(".word").textContent = ready ? "ready" : "no worker";
    }
    document.getElementById("ready-count").textContent = Object.values(models).filter(Boolean).length;
    document.getElementById("worker-count").textContent = health.workers_active ?? 0;
  } catch {
    // The next refresh may find it again; submitting says what is wrong.
  }
}

setInterval(refresh, REFRESH_MS);
results.open();
