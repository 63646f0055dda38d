"use strict";
(() => {
  const CARDS = 60, ROWS = 200, PRINTED_CARDS = 240, AHEAD = "800px";
  const $ = (id) => document.getElementById(id);
  const { classes, rows } = JSON.parse($("data").textContent);
  const root = document.documentElement;
  const collator = new Intl.Collator("en", { numeric: true });

  /** A new element: `properties` are set on it, `children` are elements or plain text, never HTML. */
  const make = (tag, properties = {}, ...children) => {
    const element = Object.assign(document.createElement(tag), properties);
    element.append(...children);
    return element;
  };

  // -- columns: what the table shows, and what can be sorted and filtered by -------------------------------

  const share = (row, i) => (100 * row.pixels[i]) / (row.width * row.height);
  const megapixels = (pixels) => `${(pixels / 1e6).toFixed(pixels < 1e7 ? 3 : 1)} Mpx`;
  const done = (value) => (row) => (row.error === undefined ? value(row) : null);
  const columns = [
    { key: "name", label: "Image", value: (row) => row.name },
    ...classes.map((name, i) => ({
      key: `class-${i}`, label: `${name}, %`, value: done((row) => share(row, i)),
      text: (value) => value.toFixed(1), more: (row) => megapixels(row.pixels[i]),
    })),
    { key: "ratio", label: "tumour-stroma ratio", value: done((row) => row.ratio), text: (value) => value.toFixed(3) },
    { key: "confidence", label: "confidence, %", value: done((row) => row.confidence && 100 * row.confidence), text: (value) => value.toFixed(1) },
    { key: "size", label: "size, Mpx", value: done((row) => (row.width * row.height) / 1e6),
      text: (value) => value.toFixed(2), more: (row) => `${row.width} × ${row.height}` },
    { key: "notes", label: "Notes", words: true, value: (row) => row.error ?? (row.notes.join("; ") || null) },
  ].filter((column) => column.key !== "ratio" || rows.some((row) => typeof row.ratio === "number"));
  const byKey = Object.fromEntries(columns.map((column) => [column.key, column]));

  // -- pictures: they are decoded while their card is near the screen, and let go of after ------------------

  /** The two pictures of a row over each other; the upper one's opacity is the tint. */
  const stack = (index) => {
    const row = rows[index];
    if (row.error !== undefined) return make("span", { className: "none" }, "failed");
    if (!row.image && !row.mask) return make("span", { className: "none" }, "no picture");
    const [image, mask] = $(`p${index}`).textContent.split(",");
    const box = make("span", { className: `stack ${row.width * 3 >= row.height * 4 ? "wide" : "tall"}` });
    box.style.aspectRatio = `${row.width} / ${row.height}`;
    box.style.setProperty("--aspect", row.width / row.height);
    box.classList.toggle("alone", !image);
    if (image) box.append(make("img", { alt: "", src: `data:image/jpeg;base64,${image}` }));
    if (mask) box.append(make("span", { className: "blend" }, make("img", { alt: "", src: `data:image/png;base64,${mask}` })));
    return box;
  };
  const fill = (card) => card.firstChild.firstChild || card.firstChild.append(stack(+card.dataset.index));
  const watcher = new IntersectionObserver((seen) => {
    for (const { target, isIntersecting } of seen) isIntersecting ? fill(target) : target.firstChild.replaceChildren();
  }, { rootMargin: `${AHEAD} 0px` });

  // -- gallery and table ------------------------------------------------------------------------------------

  const figures = (row) => classes.map((name, i) => `${name} ${share(row, i).toFixed(1)} %`).join(", ");

  const card = (index) => {
    const row = rows[index];
    const button = make("button", { type: "button", className: "card" }, make("span", { className: "frame" }),
      make("bdi", { className: "name" }, row.name));
    button.dataset.index = index;
    if (row.error !== undefined) {
      button.append(make("span", { className: "note" }, row.error));
      return button;
    }
    const parts = make("span", { className: "parts" }, ...classes.map((_, i) => {
      const part = make("span", { className: `class-${i}` });
      part.style.flexGrow = row.pixels[i];
      return part;
    }));
    button.append(parts, make("span", { className: "small" }, figures(row)));
    const confidence = row.confidence === null ? "nothing but glass" : `confidence ${(100 * row.confidence).toFixed(1)} %`;
    const scores = make("span", { className: "small" }, confidence);
    if (row.ratio !== null) scores.prepend(make("abbr", { title: "tumour-stroma ratio" }, "TSR"), ` ${row.ratio.toFixed(2)}, `);
    button.append(scores);
    for (const note of row.notes) button.append(make("span", { className: "note" }, note));
    return button;
  };

  const line = (index) => {
    const row = rows[index], open = make("button", { type: "button" }, make("bdi", {}, row.name));
    open.dataset.index = index;
    const head = make("th", { scope: "row" }, open);
    if (row.error !== undefined) return make("tr", {}, head, make("td", { className: "words note", colSpan: columns.length - 1 }, row.error));
    return make("tr", {}, head, ...columns.slice(1).map((column) => {
      const value = column.value(row), cell = make("td", { className: column.words ? "words" : "" });
      if (value === null) cell.append(column.words ? "" : "–");
      else cell.append(column.text ? column.text(value) : value);
      if (value !== null && column.more) cell.append(make("small", {}, column.more(row)));
      return cell;
    }));
  };

  const state = { sort: "name", descending: false, limit: CARDS, as: "gallery", listed: [] };
  const gallery = $("gallery"), body = $("table").tBodies[0];

  const number = (id) => ($(id).value === "" ? null : $(id).valueAsNumber);
  const matching = () => {
    const words = $("search").value.toLowerCase(), status = $("status").value;
    const column = byKey[$("column").value], low = number("low"), high = number("high");
    return [...rows.keys()].filter((index) => {
      const row = rows[index], failed = row.error !== undefined;
      if (words && !row.name.toLowerCase().includes(words)) return false;
      if (status === "done" && failed) return false;
      if (status === "failed" && !failed) return false;
      if (status === "notes" && (failed || !row.notes.length)) return false;
      if (low === null && high === null) return true;
      const value = column.value(row), exact = Math.round(value * 1e7) / 1e7;  // 100 * 0.55 is a little more than 55
      return value !== null && (low === null || exact >= low) && (high === null || exact < high);
    });
  };

  /** Rows without a value come last in both directions; equal ones stay in the order of names. */
  const compare = (a, b) => {
    const [x, y] = [a, b].map((index) => byKey[state.sort].value(rows[index]));
    const byName = () => collator.compare(rows[a].name, rows[b].name) || a - b;
    if (x === null || y === null) return (x === null) - (y === null) || byName();
    const order = typeof x === "string" ? collator.compare(x, y) : x - y;
    return (state.descending ? -order : order) || byName();
  };

  /** Put the first `limit` of the listed images on the page, adding to what is there. */
  const extend = (box, made, limit, after = () => {}) => {
    const added = state.listed.slice(box.childElementCount, limit).map(made);
    box.append(...added);
    added.forEach(after);
    return added;
  };
  const show = () => {
    const inTable = state.as === "table", total = state.listed.length;
    gallery.hidden = inTable;
    $("table-box").hidden = !inTable;
    const added = inTable ? extend(body, line, state.limit) : extend(gallery, card, state.limit, (c) => watcher.observe(c));
    const count = Math.min(state.limit, total), step = inTable ? ROWS : CARDS;
    $("shown").textContent = `${count.toLocaleString("en")} of ${total.toLocaleString("en")} shown` +
      (total < rows.length ? `, filtered from ${rows.length.toLocaleString("en")}` : "");
    $("more").hidden = $("everything").hidden = count === total;
    $("more").textContent = `Show ${Math.min(step, total - count)} more`;
    $("everything").textContent = `Show all ${total.toLocaleString("en")}`;
    return added;
  };

  const list = () => {
    state.listed = matching().sort(compare);
    state.limit = state.as === "table" ? ROWS : CARDS;
    watcher.disconnect();
    gallery.replaceChildren();
    body.replaceChildren();
    for (const head of $("table").tHead.rows[0].cells) {
      const sorted = head.dataset.key === state.sort;
      head.setAttribute("aria-sort", sorted ? (state.descending ? "descending" : "ascending") : "none");
    }
    $("sort").value = state.sort;
    $("direction").setAttribute("aria-pressed", state.descending);
    for (const bar of document.querySelectorAll(".bar")) {
      bar.classList.toggle("chosen", bar.dataset.column === $("column").value && bar.dataset.low === $("low").value && bar.dataset.high === $("high").value);
    }
    show();
  };

  const sortBy = (key) => {
    state.descending = key === state.sort ? !state.descending : !(key === "name" || key === "notes");
    state.sort = key;
    list();
  };

  // -- tint and view -----------------------------------------------------------------------------------------

  const setView = (view) => {
    root.classList.remove("view-image", "view-overlay", "view-mask");
    root.classList.add(`view-${view}`);
    for (const radio of document.querySelectorAll(`.view[value=${view}]`)) radio.checked = true;
  };
  const setTint = (percent) => {
    root.style.setProperty("--tint", percent / 100);
    for (const slider of document.querySelectorAll(".tint")) slider.value = percent;
    for (const output of document.querySelectorAll(".tint-value")) output.textContent = `${percent} %`;
  };

  // -- viewer ------------------------------------------------------------------------------------------------

  const viewer = $("viewer"), stage = viewer.querySelector(".viewer-stage");
  let place = 0;
  const view = (position) => {
    place = Math.max(0, Math.min(state.listed.length - 1, position));
    const index = state.listed[place], row = rows[index];
    $("viewer-title").replaceChildren(make("bdi", {}, row.name));
    stage.replaceChildren(stack(index));
    const facts = columns.slice(1).map((column) => [column, column.value(row)]).filter(([, value]) => value !== null);
    $("viewer-facts").replaceChildren(...facts.flatMap(([column, value]) => [make("dt", {}, column.label),
      make("dd", {}, (column.text ? column.text(value) : value) + (column.more ? ` (${column.more(row)})` : ""))]));
    $("viewer-links").replaceChildren(...Object.entries(row.links ?? {}).flatMap(([kind, href]) =>
      [make("a", { href, target: "_blank", rel: "noopener" }, `${kind}, full size`), " "]));
    $("previous").disabled = place === 0;
    $("next").disabled = place === state.listed.length - 1;
    if (!viewer.open) viewer.showModal();
  };
  const openFrom = (event) => {
    const origin = event.target.closest("[data-index]");
    if (origin) view(state.listed.indexOf(+origin.dataset.index));
  };
  viewer.addEventListener("close", () => {
    if (place >= state.limit) { state.limit = place + 1; show(); }
    const seen = (state.as === "table" ? body : gallery).children[place];
    (seen?.querySelector("button") ?? seen)?.focus();
    stage.replaceChildren();
  });
  viewer.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.altKey || event.metaKey) return;
    const views = { 1: "image", 2: "overlay", 3: "mask" };
    if (event.key in views) setView(views[event.key]);
    else if (event.target.matches("input")) return;
    else if (event.key === "ArrowRight") view(place + 1);
    else if (event.key === "ArrowLeft") view(place - 1);
    else return;
    event.preventDefault();
  });

  /** Arrow keys walk over the cards as they lie on the screen. */
  const walk = (event) => {
    const cards = [...gallery.children], at = cards.indexOf(document.activeElement);
    if (at < 0 || event.ctrlKey || event.altKey || event.metaKey) return;
    const top = cards[0].offsetTop, across = cards.findIndex((c) => c.offsetTop !== top);
    const width = across < 0 ? cards.length : across;
    const steps = { ArrowRight: 1, ArrowLeft: -1, ArrowDown: width, ArrowUp: -width, Home: -at, End: cards.length - 1 - at };
    if (!(event.key in steps)) return;
    event.preventDefault();
    cards[at + steps[event.key]]?.focus();
  };

  // -- print: all rows, and the first cards with their pictures ready ---------------------------------------

  const prepare = () => {
    extend(body, line, Infinity);
    extend(gallery, card, PRINTED_CARDS, (c) => watcher.observe(c));
    const cards = [...gallery.children].slice(0, PRINTED_CARDS);
    cards.forEach(fill);
    if (state.listed.length > PRINTED_CARDS) $("shown").textContent = `Pictures of the first ${PRINTED_CARDS} of ${state.listed.length} images`;
    return Promise.allSettled(cards.flatMap((c) => [...c.querySelectorAll("img")]).map((img) => img.decode()));
  };
  addEventListener("beforeprint", prepare);
  addEventListener("afterprint", list);

  // -- start ---------------------------------------------------------------------------------------------------

  for (const column of columns) {
    const head = make("th", { scope: "col", className: column.words ? "words" : "" }, make("button", { type: "button", onclick: () => sortBy(column.key) }, column.label));
    head.dataset.key = column.key;
    $("table").tHead.rows[0].append(head);
    $("sort").append(make("option", { value: column.key }, column.label));
    if (column.text) $("column").append(make("option", { value: column.key }, column.label));
  }
  classes.forEach((name, i) => $("legend").append(make("li", {}, make("span", { className: `swatch class-${i}` }), name)));
  for (const id of ["search", "low", "high"]) $(id).addEventListener("input", list);
  for (const id of ["status", "column"]) $(id).addEventListener("change", list);
  $("sort").addEventListener("change", () => { state.sort = $("sort").value; list(); });
  $("direction").addEventListener("click", () => { state.descending = !state.descending; list(); });
  $("clear").addEventListener("click", () => { $("tools").reset(); setView("overlay"); setTint(40); setAs(state.as); list(); });
  $("print").addEventListener("click", () => prepare().then(() => print()));
  const setAs = (as) => { state.as = as; document.querySelector(`input[name=as][value=${as}]`).checked = true; };
  for (const radio of document.querySelectorAll("input[name=as]")) radio.addEventListener("change", () => { setAs(radio.value); list(); });
  for (const radio of document.querySelectorAll(".view")) radio.addEventListener("change", () => setView(radio.value));
  for (const slider of document.querySelectorAll(".tint")) slider.addEventListener("input", () => { setView("overlay"); setTint(slider.value); });
  for (const bar of document.querySelectorAll(".bar")) {
    bar.addEventListener("click", () => {
      $("column").value = bar.dataset.column;
      $("low").value = bar.dataset.low;
      $("high").value = bar.dataset.high;
      list();
      $("images").scrollIntoView();
    });
  }
  gallery.addEventListener("click", openFrom);
  gallery.addEventListener("keydown", walk);
  body.addEventListener("click", openFrom);
  $("tools").addEventListener("submit", (event) => event.preventDefault());
  $("close").addEventListener("click", () => viewer.close());
  $("previous").addEventListener("click", () => view(place - 1));
  $("next").addEventListener("click", () => view(place + 1));
  $("more").addEventListener("click", () => { state.limit += state.as === "table" ? ROWS : CARDS; focusFirst(show()); });
  $("everything").addEventListener("click", () => { state.limit = Infinity; focusFirst(show()); });
  const focusFirst = ([first]) => (first?.matches("button") ? first : first?.querySelector("button"))?.focus();
  root.classList.add("scripted");
  $("tools").hidden = false;
  setView("overlay");
  setTint(40);
  list();
})();
