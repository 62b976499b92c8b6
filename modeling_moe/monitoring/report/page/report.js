// Copyright 2026 The modeling_moe authors. Licensed under the Apache License, Version 2.0.
// Chooses pictures, names the cell under the pointer, lists tokens and shows texts. Every text of the data goes through
// textContent or an attribute, never through markup.
"use strict";
(() => {
  const one = (selector, under = document) => under.querySelector(selector);
  const all = (selector, under = document) => [...under.querySelectorAll(selector)];
  const json = (id) => JSON.parse(document.getElementById(id).textContent);

  function element(tag, properties = {}, ...children) {
    const made = Object.assign(document.createElement(tag), properties);
    made.append(...children);
    return made;
  }

  function fill(select, labels) {
    const before = select.value;
    select.replaceChildren(...labels.map(([value, label]) => element("option", { value, textContent: label })));
    if (labels.some(([value]) => String(value) === before)) select.value = before;
  }

  // ---- pictures: the choice of a layer, and the value under the pointer or the arrow keys

  function pictures(section) {
    const figures = all("figure", section);
    const variants = figures.map((figure) => {
      const stage = one(".stage", figure);
      const first = document.createDocumentFragment();
      return { stage, first, shown: 0, others: all("template", figure).map((template) => template.content) };
    });
    one("[data-choice]", section)?.addEventListener("change", (event) => {
      const place = Number(event.target.value);
      for (const [index, variant] of variants.entries()) {
        forget(figures[index]);
        if (variant.shown === 0) variant.first.append(...variant.stage.childNodes);
        const fewer = element("p", { className: "note", textContent: "This model has fewer sparse layers." });
        variant.stage.replaceChildren(...(place === 0 ? variant.first.childNodes : [variant.others[place - 1]?.cloneNode(true) ?? fewer]));
        variant.shown = place;
      }
      const captions = all(".caption", section);
      if (captions.length > 1) captions.forEach((caption, index) => (caption.hidden = (place === 0) !== (index === 0)));
    });
    figures.forEach(readValues);
  }

  const known = new WeakMap(); // figure -> its heat maps, parsed when they are first needed

  function forget(figure) {
    known.delete(figure);
    one(".cell", figure)?.remove();
    one("output", figure).textContent = "";
  }

  function maps(figure) {
    const cells = one(".cells", figure); // none where a model has fewer layers
    if (!known.has(figure)) known.set(figure, { maps: cells ? JSON.parse(cells.textContent) : [], map: 0, row: -1, column: 0 });
    return known.get(figure);
  }

  function mark(figure, state) {
    const view = one(".view", figure);
    one(".cell", view)?.remove();
    const map = state.maps[state.map];
    if (!map || state.row < 0) return;
    const [left, top, right, bottom] = map.box;
    const width = (right - left) / map.columns.length, height = (bottom - top) / map.rows.length;
    const box = element("i", { className: "cell" });
    box.style.cssText = [["left", left + state.column * width], ["top", top + state.row * height], ["width", width], ["height", height]]
      .map(([side, share]) => `${side}:${100 * share}%`).join(";");
    view.append(box);
    const value = map.values[state.row][state.column];
    one("output", figure).textContent =
      `${map.rows[state.row]}, ${map.columns[state.column]}: ${value === null ? "no value" : `${String(value).replace("-", "\u2212")} ${map.unit}`}`;
  }

  function readValues(figure) {
    figure.addEventListener("pointermove", (event) => {
      const view = event.target.closest(".view");
      if (!view) return;
      const state = maps(figure), frame = view.getBoundingClientRect();
      const x = (event.clientX - frame.left) / frame.width, y = (event.clientY - frame.top) / frame.height;
      const index = state.maps.findIndex(({ box }) => x >= box[0] && x < box[2] && y >= box[1] && y < box[3]);
      if (index < 0) return;
      const { box, rows, columns } = state.maps[index];
      const row = Math.floor(((y - box[1]) / (box[3] - box[1])) * rows.length);
      const column = Math.floor(((x - box[0]) / (box[2] - box[0])) * columns.length);
      if (index === state.map && row === state.row && column === state.column) return;
      Object.assign(state, { map: index, row, column });
      mark(figure, state);
    });
    figure.addEventListener("pointerleave", () => {
      one(".cell", figure)?.remove();
      one("output", figure).textContent = "";
      if (known.has(figure)) known.get(figure).row = -1;
    });
    figure.addEventListener("keydown", (event) => {
      const step = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] }[event.key];
      if (!step || event.target !== figure) return;
      const state = maps(figure);
      if (!state.maps.length) return;
      event.preventDefault();
      const within = (value, count) => Math.max(0, Math.min(count - 1, value));
      if (state.row < 0) Object.assign(state, { row: 0, column: 0 });
      else if (step[0] > 0 && state.row === state.maps[state.map].rows.length - 1 && state.map < state.maps.length - 1) {
        Object.assign(state, { map: state.map + 1, row: 0 });
      } else if (step[0] < 0 && state.row === 0 && state.map > 0) {
        Object.assign(state, { map: state.map - 1, row: state.maps[state.map - 1].rows.length - 1 });
      } else {
        state.row = within(state.row + step[0], state.maps[state.map].rows.length);
        state.column = within(state.column + step[1], state.maps[state.map].columns.length);
      }
      state.column = within(state.column, state.maps[state.map].columns.length);
      mark(figure, state);
    });
  }

  // ---- tokens of each expert

  const spaced = (text) => text.replaceAll(" ", "\u2423");
  const percent = (share) => `${Math.round(100 * share)} %`;
  const token = (text) => element("bdi", { className: "token", textContent: spaced(text) });

  function contextCell([text, , , before, after]) {
    return element("td", { className: "context" }, element("bdi", {}, before, element("mark", { textContent: text }), after));
  }

  function table(titles, rows) {
    const head = element("tr", {}, ...titles.map((title) => element("th", { scope: "col", textContent: title })));
    return element("table", {}, element("thead", {}, head), element("tbody", {}, ...rows));
  }

  function expertsOf(section, models) {
    const list = one(".experts", section), search = one("[data-search]", section);
    const modelChoice = one("[data-model]", section), layerChoice = one("[data-layer]", section);
    const parsed = new Map();
    const top = (model, layer) => {
      const id = `top-${model}-${layer}`;
      if (!parsed.has(id)) parsed.set(id, json(id));
      return parsed.get(id);
    };
    const model = () => Number(modelChoice?.value ?? 0);
    const cells = (entry) => [element("td", {}, token(entry[0])), element("td", { textContent: `${percent(entry[2])} (${entry[1]})` }), contextCell(entry)];

    function details(entries, expert) {
      const preview = entries.slice(0, 6).map((entry) => token(entry[0]));
      if (!preview.length) preview.push(element("span", { className: "empty", textContent: "no token often enough" }));
      const made = element("details", {}, element("summary", {}, element("b", { textContent: `Expert ${expert}` }), ...preview));
      made.addEventListener("toggle", () => {
        if (!made.open || one("table", made)) return;
        made.append(table(["Token", "Share taken (count)", "In context"], entries.map((entry) => element("tr", {}, ...cells(entry)))));
      });
      return made;
    }

    function found(wanted) {
      const rows = [];
      for (const [place, [layer]] of models[model()].layers.entries()) {
        for (const [expert, entries] of top(model(), place).entries()) {
          for (const entry of entries) {
            if (!entry[0].toLowerCase().includes(wanted) && !spaced(entry[0]).toLowerCase().includes(wanted)) continue;
            if (rows.length === 200) return rows;
            rows.push(element("tr", {}, element("td", { textContent: layer }), element("td", { textContent: expert }), ...cells(entry)));
          }
        }
      }
      return rows;
    }

    function show() {
      const wanted = search.value.toLowerCase();
      layerChoice.disabled = wanted !== "";
      if (!wanted) return list.replaceChildren(...top(model(), Number(layerChoice.value)).map(details));
      const rows = found(wanted);
      const none = element("p", { className: "empty", textContent: "No expert has such a token among the tokens that it takes most." });
      list.replaceChildren(rows.length ? table(["Layer", "Expert", "Token", "Share taken (count)", "In context"], rows) : none);
    }

    function chooseModel() {
      fill(layerChoice, models[model()].layers.map(([layer], place) => [place, layer]));
      show();
    }
    if (modelChoice) fill(modelChoice, models.map(({ name }, place) => [place, `${place + 1}: ${name}`]));
    modelChoice?.addEventListener("change", chooseModel);
    layerChoice.addEventListener("change", show);
    search.addEventListener("input", show);
    chooseModel();
  }

  // ---- texts, token by token

  function array(text, Kind) {
    const bytes = Uint8Array.from(atob(text), (character) => character.charCodeAt(0));
    return new Kind(bytes.buffer); // little-endian, as all machines that run a browser are
  }

  function decode(id) {
    if (!document.getElementById(id)) return null;
    const data = json(id);
    const [layers, size, topK] = data.shape;
    const index = array(data.index, data.bytes === 1 ? Uint8Array : Uint16Array);
    const weight = array(data.weight, Int16Array), margin = data.margin === null ? null : array(data.margin, Int16Array);
    const empty = data.bytes === 1 ? 255 : 65535;
    const routes = (layer, place) => {
      const found = [];
      for (let k = (layer * size + place) * topK, end = k + topK; k < end; k++) {
        if (index[k] !== empty) found.push([index[k], weight[k] === -32768 ? null : weight[k] * data.weight_unit]);
      }
      const rank = ([, value]) => value ?? -Infinity; // the weight of a dropped assignment is null
      return found.sort((a, b) => (rank(a) === rank(b) ? 0 : rank(b) - rank(a)));
    };
    const reached = (layer, place) => routes(layer, place).filter(([, value]) => value !== null);
    const marginOf = (layer, place) => {
      const whole = margin === null ? -32768 : margin[layer * size + place];
      return whole === -32768 ? null : whole * data.margin_unit;
    };
    return { tokens: data.tokens, long: data.long, layers, routes, reached, marginOf };
  }

  function texts(section, models) {
    const list = one(".tokens", section), said = one("[role=status]", section), panel = one(".routes", section);
    const choices = Object.fromEntries(["model", "text", "layer", "expert"].map((name) => [name, one(`[data-${name}]`, section)]));
    const cache = new Map();
    const load = (model, text) => {
      const id = `text-${model}-${text}`;
      if (!cache.has(id)) cache.set(id, decode(id));
      return cache.get(id);
    };
    const chosen = (name) => Number(choices[name]?.value ?? 0);
    let spans = [], text = null, other = null, current = -1;

    function build() {
      if (!choices.text.options.length) {
        spans = [];
        list.replaceChildren();
        panel.replaceChildren();
        said.textContent = "The report holds no text of this model.";
        return;
      }
      text = load(chosen("model"), chosen("text"));
      other = models.length > 1 ? load(1 - chosen("model"), chosen("text")) : null;
      if (other && (other.tokens.length !== text.tokens.length || other.tokens.some((one, place) => one !== text.tokens[place]))) other = null;
      spans = text.tokens.map((shown, place) => {
        const span = element("bdi", { textContent: shown, title: text.long[place] ?? "", tabIndex: place ? -1 : 0 });
        span.setAttribute("role", "option");
        span.setAttribute("aria-selected", "false");
        span.dataset.place = place;
        return span;
      });
      list.replaceChildren(...spans.flatMap((span) => (span.textContent.endsWith("\u21b5") ? [span, element("br")] : [span])));
      list.scrollTop = 0;
      current = -1;
      colour();
      select(0);
    }

    function colour() {
      const layer = chosen("layer"), only = choices.expert.value;
      for (const [place, span] of spans.entries()) {
        const routes = text.reached(layer, place);
        const first = routes[0]?.[0];
        const shown = only === "" ? first : routes.find(([expert]) => String(expert) === only)?.[0];
        span.dataset.expert = shown ?? (only === "" ? "\u2013" : "");
        span.className = shown === undefined ? "other" : `t${shown % 8}`;
      }
    }

    function chooseLayer() {
      const experts = models[chosen("model")].layers[chosen("layer")][1];
      fill(choices.expert, [["", "all"], ...Array.from({ length: experts }, (_, expert) => [expert, expert])]);
    }

    function routesTable(of, place, against, model) {
      const rows = models[model].layers.map(([layer], index) => {
        const before = against && index < against.layers ? new Set(against.routes(index, place).map(([expert]) => expert)) : null;
        const experts = of.routes(index, place).map(([expert, weight]) => {
          const moved = before !== null && !before.has(expert);
          const value = weight === null ? "dropped" : weight.toFixed(2);
          const span = element("span", { className: moved ? "moved" : "" }, String(expert), " ", element("small", { textContent: value }));
          if (moved) span.title = "not chosen by the other model";
          return span;
        });
        const margin = of.marginOf(index, place);
        const row = element("tr", { className: index === chosen("layer") ? "chosen" : "" },
          element("th", { scope: "row", textContent: layer }),
          element("td", {}, ...(experts.length ? experts : ["none"])),
          element("td", { className: "number", textContent: margin === null ? "\u2013" : margin.toFixed(2) }));
        return row;
      });
      const made = table(["Layer", "Experts and weights", "Margin"], rows);
      if (models.length > 1) made.prepend(element("caption", {}, `${model + 1}: `, element("bdi", { textContent: models[model].name })));
      return made;
    }

    function describe(place) {
      const layer = chosen("layer"), routes = text.reached(layer, place), margin = text.marginOf(layer, place);
      const first = routes.length ? `first expert ${routes[0][0]} with weight ${routes[0][1].toFixed(2)}` : "no expert";
      const rest = margin === null ? "" : `, margin ${margin.toFixed(2)}`;
      said.replaceChildren("Token ", token(text.tokens[place]), `, ${place + 1} of ${spans.length}. In layer ${models[chosen("model")].layers[layer][0]}: ${first}${rest}.`);
      const tables = [routesTable(text, place, other, chosen("model"))];
      if (other) tables.push(routesTable(other, place, text, 1 - chosen("model")));
      panel.replaceChildren(...tables);
    }

    function select(place, focus = false) {
      if (place < 0 || place >= spans.length) return;
      if (place !== current) {
        if (current >= 0) {
          spans[current].setAttribute("aria-selected", "false");
          spans[current].tabIndex = -1;
        }
        current = place;
        spans[place].setAttribute("aria-selected", "true");
        spans[place].tabIndex = 0;
        describe(place);
      }
      if (focus) spans[place].focus();
    }

    function nextLine(direction) {
      const here = spans[current], middle = here.offsetLeft + here.offsetWidth / 2;
      let best = current, line = null;
      for (let place = current + direction; place >= 0 && place < spans.length; place += direction) {
        const span = spans[place];
        if (span.offsetTop === here.offsetTop) continue;
        line ??= span.offsetTop;
        if (span.offsetTop !== line) break;
        const distance = (of) => Math.abs(spans[of].offsetLeft + spans[of].offsetWidth / 2 - middle);
        if (best === current || distance(place) < distance(best)) best = place;
      }
      return best;
    }

    const placeOf = (event) => event.target.closest("[data-place]")?.dataset.place;
    list.addEventListener("pointerover", (event) => placeOf(event) !== undefined && select(Number(placeOf(event))));
    list.addEventListener("focusin", (event) => placeOf(event) !== undefined && select(Number(placeOf(event))));
    list.addEventListener("keydown", (event) => {
      const place = { ArrowRight: current + 1, ArrowLeft: current - 1, Home: 0, End: spans.length - 1 }[event.key];
      const line = { ArrowDown: 1, ArrowUp: -1 }[event.key];
      if (place === undefined && line === undefined) return;
      event.preventDefault();
      select(place ?? nextLine(line), true);
    });

    function chooseModel() {
      fill(choices.layer, models[chosen("model")].layers.map(([layer], place) => [place, layer]));
      fill(choices.text, models[chosen("model")].texts.map((label, place) => [place, label]));
      chooseLayer();
      build();
    }
    if (choices.model) fill(choices.model, models.map(({ name }, place) => [place, `${place + 1}: ${name}`]));
    choices.model?.addEventListener("change", chooseModel);
    choices.text.addEventListener("change", build);
    choices.layer.addEventListener("change", () => {
      chooseLayer();
      if (!spans.length) return;
      colour();
      describe(current);
    });
    choices.expert.addEventListener("change", colour);
    chooseModel();
  }

  const models = all("script[id^=model-]").map((script) => JSON.parse(script.textContent));
  all(".pictures").forEach(pictures);
  if (models.length) {
    expertsOf(document.getElementById("tokens"), models);
    texts(document.getElementById("texts"), models);
  }
})();
