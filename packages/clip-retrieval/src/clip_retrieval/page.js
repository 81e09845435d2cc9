// The page of `clip-retrieval serve`: it asks the same service as every other client.
// What is shown follows from the address: ?q=TEXT, ?id=ROW, ?index=NAME, ?fold=0. A picture that
// was uploaded stays in this tab; its address cannot be shared.

const PAGE = 40; // hits whose captions are fetched at a time
const FOUND = 1000; // nearest pictures asked for
const LARGE = 3e6; // bytes; a larger upload is scaled down to SIDE pixels here
const SIDE = 1024;

const $ = (id) => document.getElementById(id);
const uploads = new Map(); // key of a history entry -> File
const results = new Map(); // key of a history entry -> its hits, to come back to
let indices = []; // {name, images, version}
let view = {}; // {key, index, q, id, upload, fold}
let current = null; // the entry of `results` that is shown: {hits, drawn, version, asked, scroll}

// ---- the service

async function ask(path, body, signal) {
  let answer;
  try {
    const options = body && { method: "POST", body: JSON.stringify(body) };
    answer = await fetch(path, { ...options, signal });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Error("The server does not answer. Is it still running?");
  }
  const found = await answer.json().catch((error) => {
    if (error.name === "AbortError") throw error; // a newer search, while this answer was arriving
    return { error: `The server answered ${answer.status}, and not in full` };
  });
  if (!answer.ok || found.error) throw new Error(found.error);
  found.version = answer.headers.get("index-version");
  return found;
}

async function search(signal) {
  const query = {
    indice_name: view.index, modality: "image", deduplicate: view.fold,
    num_images: PAGE, num_result_ids: FOUND + (view.id !== null), // a picture finds itself first
  };
  if (view.id !== null) query.id = view.id;
  else if (view.upload) query.image = await base64(uploads.get(view.key));
  else query.text = view.q;
  return ask("knn-service", query, signal);
}

// Rows spread over the index, for a start without a question.
function sample() {
  const { images, version } = indices.find((index) => index.name === view.index);
  const count = Math.min(images, FOUND);
  const rows = Array.from({ length: count }, (_, n) => ({ id: Math.floor((n * images) / count) }));
  let random = 1;
  for (let n = count - 1; n > 0; n--) { // shuffled, the same way every time
    random = (Math.imul(random, 1103515245) + 12345) >>> 0;
    const other = (random >>> 8) % (n + 1);
    [rows[n], rows[other]] = [rows[other], rows[n]];
  }
  return Object.assign(rows, { version });
}

async function describe(hits, version, signal) {
  const ids = hits.filter((hit) => hit.caption === undefined).map((hit) => hit.id);
  if (!ids.length) return;
  const body = { indice_name: view.index, ids, version };
  const found = await ask("metadata", body, signal);
  const byId = new Map(found.map(({ id, metadata }) => [id, metadata]));
  // a column of the data may be called similarity, too: the hit's own wins
  for (const hit of hits) Object.assign(hit, { ...byId.get(hit.id), ...hit });
}

async function base64(file) {
  let blob = file;
  if (file.size > LARGE) {
    const bitmap = await createImageBitmap(file).catch(() => {
      throw new Error("This file is not a picture that the browser can read.");
    });
    const scale = Math.min(1, SIDE / Math.max(bitmap.width, bitmap.height));
    const canvas = document.createElement("canvas");
    canvas.width = Math.max(1, Math.round(bitmap.width * scale));
    canvas.height = Math.max(1, Math.round(bitmap.height * scale));
    canvas.getContext("2d").drawImage(bitmap, 0, 0, canvas.width, canvas.height);
    blob = await new Promise((done) => canvas.toBlob(done, "image/jpeg", 0.92));
  }
  return new Promise((done, failed) => {
    const reader = new FileReader();
    reader.onload = () => done(reader.result.split(",")[1] ?? "");
    reader.onerror = () => failed(new Error("The picture could not be read."));
    reader.readAsDataURL(blob);
  });
}

// ---- the address

function fromAddress() {
  const given = new URLSearchParams(location.search);
  const id = given.get("id");
  return {
    key: history.state?.key ?? 0,
    index: given.get("index") ?? indices[0].name,
    q: given.get("q") ?? "",
    id: id !== null && /^\d+$/.test(id) ? Number(id) : null,
    upload: given.get("picture"),
    fold: given.get("fold") !== "0",
  };
}

function address({ index, q, id, upload, fold }) {
  const given = new URLSearchParams();
  if (id !== null) given.set("id", id);
  else if (upload) given.set("picture", upload);
  else if (q) given.set("q", q);
  if (index !== indices[0].name) given.set("index", index);
  if (!fold) given.set("fold", "0");
  return `?${given}`;
}

// Another view, as a new entry of the history; `file` is a picture to search with.
function go(change, file) {
  const key = Date.now() + Math.random();
  if (file) uploads.set(key, file);
  else if (uploads.has(view.key) && change.upload === undefined) uploads.set(key, uploads.get(view.key));
  keepPlace();
  history.pushState({ key }, "", address({ ...view, ...change }));
  show();
}

const keepPlace = () => { if (current) current.scroll = scrollY; };

// ---- what is shown

async function show() {
  current?.controller.abort();
  view = fromAddress();
  const kept = results.get(view.key);
  current = kept ?? { hits: [], drawn: 0, scroll: 0, controller: null };
  current.controller = new AbortController();
  const { signal } = current.controller;
  const mine = current;

  const start = view.id === null && !view.upload && !view.q;
  $("text").value = view.id === null && !view.upload ? view.q : "";
  $("index").value = view.index;
  $("fold").checked = view.fold;
  $("folding").hidden = start;
  $("error").hidden = true;
  $("end").textContent = "";
  $("query").hidden = true;
  document.title = view.q && view.id === null ? `${view.q} · clip-retrieval` : "clip-retrieval";
  try {
    const index = indices.find((index) => index.name === view.index);
    if (!index) throw new Error(`There is no index ${view.index} here.`);
    if (view.id >= index.images) throw new Error(`There is no picture ${view.id} in ${view.index}.`);
    if (view.upload && !uploads.has(view.key)) {
      throw new Error(`The picture ${view.upload} is not kept when a page is closed. Choose it again.`);
    }
    if (view.upload) showQuery({ caption: view.upload }, URL.createObjectURL(uploads.get(view.key)));
    if (!kept) {
      $("status").textContent = "Searching…";
      wait();
      if (view.id !== null) {
        const asked = [{ id: view.id }];
        await describe(asked, undefined, signal);
        mine.asked = asked[0];
      }
      const hits = start ? sample() : await search(signal);
      mine.version = hits.version;
      mine.hits = hits.filter((hit) => hit.id !== view.id);
      await describe(mine.hits.slice(0, PAGE), mine.version, signal);
      results.set(view.key, mine);
      mine.drawn = Math.min(PAGE, mine.hits.length);
    }
    if (mine.asked) showQuery(mine.asked, `image/${path(view.id)}?v=${mine.version}`);
    $("hits").replaceChildren(...mine.hits.slice(0, mine.drawn).map((hit) => card(hit)));
    $("hits").removeAttribute("aria-busy");
    $("status").textContent = start
      ? `${index.images.toLocaleString()} pictures. Describe what you look for, drop a picture here, or click one.`
      : summary(mine.hits, index.images);
    finish();
    scrollTo(0, mine.scroll);
  } catch (error) {
    fail(error);
  }
}

function summary(hits, images) {
  if (!hits.length) return "Nothing found";
  const folded = hits.reduce((sum, hit) => sum + (hit.duplicates?.length ?? 0), 0);
  const nearest = `The nearest ${hits.length.toLocaleString()} of ${images.toLocaleString()} pictures`;
  return folded ? `${nearest}, ${folded.toLocaleString()} duplicates folded` : nearest;
}

async function more() {
  const mine = current;
  if (!mine || mine.loading || mine.drawn >= mine.hits.length || !$("error").hidden) return;
  mine.loading = true;
  try {
    const next = mine.hits.slice(mine.drawn, mine.drawn + PAGE);
    await describe(next, mine.version, mine.controller.signal);
    if (mine !== current) return;
    mine.drawn += next.length;
    $("hits").append(...next.map((hit) => card(hit)));
    finish();
  } catch (error) {
    fail(error);
  } finally {
    mine.loading = false;
  }
  if (mine === current && $("end").getBoundingClientRect().top < 2 * innerHeight) more();
}

function finish() {
  const { drawn, hits } = current;
  $("end").textContent = drawn < hits.length ? "Loading more…" : hits.length ? "That is all" : "";
}

function fail(error) {
  if (error.name === "AbortError") return;
  if (!current?.drawn) $("hits").replaceChildren();
  $("hits").removeAttribute("aria-busy");
  $("status").textContent = "";
  $("end").textContent = "";
  $("error").querySelector("p").textContent = error.message;
  $("error").hidden = false;
}

function wait() {
  const tile = () => element("li", {}, element("span", { className: "tile waiting" }));
  $("hits").setAttribute("aria-busy", "true");
  $("hits").replaceChildren(...Array.from({ length: 18 }, tile));
}

const path = (id) => `${encodeURIComponent(view.index)}/${id}`;

function card(hit) {
  const caption = (hit.caption ?? "").split("\n").join(" · ");
  const image = element("img", { alt: caption || `picture ${hit.id}`, loading: "lazy", decoding: "async" });
  const tile = element("span", { className: "tile" }, image);
  image.onload = () => image.classList.add("here");
  image.onerror = () => tile.classList.add("gone");
  image.src = `thumbnail/${path(hit.id)}?v=${current.version}`;
  if (hit.duplicates) {
    const title = `${hit.duplicates.length} nearly the same, folded`;
    tile.append(element("span", { className: "alike", title, textContent: `+${hit.duplicates.length}` }));
  }
  const words = element("span", { className: "words" },
    element("span", { className: "caption", title: caption, textContent: caption }));
  if (hit.similarity !== undefined) {
    const textContent = hit.similarity.toFixed(3);
    words.append(element("span", { className: "similarity", title: "cosine similarity", textContent }));
  }
  const link = element("a", { href: address({ ...view, q: "", id: hit.id, upload: null }) }, tile, words);
  link.onclick = (event) => {
    if (event.ctrlKey || event.metaKey || event.shiftKey || event.button) return; // a new tab
    event.preventDefault();
    go({ q: "", id: hit.id, upload: null });
  };
  return element("li", {}, link);
}

function showQuery(asked, source) {
  const image = element("img", { src: source, alt: "" });
  image.onload = () => URL.revokeObjectURL(source); // of an upload
  const facts = element("div", {}, element("h1", { textContent: asked.caption ?? `Picture ${view.id}` }));
  if (asked.id !== undefined) {
    facts.append(element("p", { textContent: asked.image_path ?? "" }));
    facts.append(element("a", { href: source, target: "_blank", textContent: "Full size" }));
    if (/^https?:/.test(asked.url ?? "")) { // never javascript:
      const more = { target: "_blank", rel: "noopener noreferrer", textContent: "Source" };
      facts.append(element("a", { href: asked.url, ...more }));
    }
  }
  $("query").replaceChildren(image, facts);
  $("query").hidden = false;
}

// Captions are other people's: text only, never HTML.
function element(name, properties, ...children) {
  const made = Object.assign(document.createElement(name), properties);
  made.append(...children);
  return made;
}

// ---- what people do

function take(files) {
  const file = [...(files ?? [])].find((each) => each.type.startsWith("image/"));
  if (file) go({ q: "", id: null, upload: file.name || "picture" }, file);
  return Boolean(file);
}

$("search").addEventListener("submit", (event) => {
  event.preventDefault();
  const q = $("text").value.trim();
  $("text").blur(); // a phone's keyboard gives way
  go({ q, id: null, upload: null });
});
$("home").addEventListener("click", (event) => {
  event.preventDefault();
  go({ q: "", id: null, upload: null });
});
$("file").addEventListener("change", () => { take($("file").files); $("file").value = ""; });
$("index").addEventListener("change", () => go({ index: $("index").value, id: null }));
$("fold").addEventListener("change", () => go({ fold: $("fold").checked }));
document.addEventListener("paste", (event) => {
  if (take(event.clipboardData?.files)) event.preventDefault();
});
document.addEventListener("keydown", (event) => {
  if (event.key !== "/" || event.target.matches("input, select")) return;
  event.preventDefault();
  $("text").select();
});
const carriesFile = (event) => event.dataTransfer?.types.includes("Files");
document.addEventListener("dragover", (event) => {
  if (!carriesFile(event)) return;
  event.preventDefault();
  $("drop").classList.add("over");
});
document.addEventListener("dragleave", (event) => {
  if (!event.relatedTarget) $("drop").classList.remove("over");
});
document.addEventListener("drop", (event) => {
  $("drop").classList.remove("over");
  if (!carriesFile(event)) return;
  event.preventDefault();
  take(event.dataTransfer.files);
});
addEventListener("popstate", () => { keepPlace(); show(); });

// Also after an error: the index may have been replaced, its rows be others.
async function begin() {
  $("error").hidden = true;
  try {
    indices = await ask("indices");
  } catch (error) {
    fail(error);
    return;
  }
  $("index").replaceChildren(
    ...indices.map(({ name }) => element("option", { value: name, textContent: name })));
  $("index").hidden = indices.length < 2;
  results.delete(history.state.key);
  await show();
}

$("error").querySelector("button").addEventListener("click", begin);

history.scrollRestoration = "manual";
history.replaceState({ key: history.state?.key ?? Math.random() }, "");
new IntersectionObserver(([entry]) => entry.isIntersecting && more(), { rootMargin: "800px" })
  .observe($("end"));
begin();
