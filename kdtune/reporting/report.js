
"use strict";
// All that is shown is in the page; this only reads it out where one points. Texts go in as text, never as markup.
(() => {
  const tip = document.createElement("div");
  tip.className = "tip";
  tip.hidden = true;
  tip.setAttribute("role", "status");
  document.body.append(tip);

  const make = (tag, text, name) => {
    const made = document.createElement(tag);
    made.textContent = text;
    if (name) made.className = name;
    return made;
  };
  const place = (x, y) => {
    tip.hidden = false;
    const width = document.documentElement.clientWidth, box = tip.getBoundingClientRect();
    const left = x + 14 + box.width < width - 6 ? x + 14 : Math.max(6, x - 14 - box.width);
    const top = y - box.height - 12 > 0 ? y - box.height - 12 : y + 18;
    tip.style.left = `${left + scrollX}px`;
    tip.style.top = `${top + scrollY}px`;
  };
  const hide = () => { tip.hidden = true; };

  const nearest = (values, x) => {
    let low = 0, high = values.length - 1;
    while (high - low > 1) {
      const middle = (low + high) >> 1;
      if (values[middle] < x) low = middle; else high = middle;
    }
    return x - values[low] <= values[high] - x ? low : high;
  };
  const written = (value, share) => {
    if (share) return `${(100 * value).toFixed(1)}%`;
    const size = Math.abs(value);
    if (size && (size < 1e-3 || size >= 1e7)) return value.toExponential(2);
    if (size >= 1000) return Math.round(value).toLocaleString("en");
    const digits = size ? Math.floor(Math.log10(size)) : 0;
    return size ? value.toFixed(digits > 0 ? Math.max(1, 3 - digits) : digits > -2 ? 3 : 2 - digits) : "0";
  };

  for (const svg of document.querySelectorAll(".chart svg")) {
    const [x0, x1, left, right, y0, y1, bottom, top, log] = svg.dataset.scale.split(" ").map(Number);
    const share = svg.dataset.share === "1";
    let lines = null, shown = [], at = null;
    const read = () => lines ??= [...svg.querySelectorAll(".line")].map((path) => ({
      look: path.parentNode.getAttribute("class"),
      group: path.parentNode,
      name: path.dataset.name,
      xs: path.dataset.x.split(" ").map(Number),
      ys: path.dataset.y.split(" ").map(Number),
    }));
    const px = (x) => left + (right - left) * (x - x0) / (x1 - x0);
    const py = (y) => bottom + (top - bottom) * (log ? Math.log(y / y0) / Math.log(y1 / y0) : (y - y0) / (y1 - y0));
    const clear = () => { shown.forEach((one) => one.remove()); shown = []; at = null; hide(); };
    const put = (tag, attributes) => {
      const made = document.createElementNS(svg.namespaceURI, tag);
      for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
      svg.append(made);
      shown.push(made);
    };
    const show = (x, y, clientX, clientY) => {
      clear();
      const found = read().filter((line) => !line.group.classList.contains("dim")).map((line) => {
        const i = nearest(line.xs, x);
        return { ...line, x: line.xs[i], y: line.ys[i] };
      }).filter((point) => point.x !== undefined);
      if (!found.length) return;
      at = found.reduce((a, b) => Math.abs(a.x - x) <= Math.abs(b.x - x) ? a : b).x;
      // Of many curves those that are nearest to where one points.
      const near = found.filter((point) => Math.abs(px(point.x) - px(at)) < 12)
        .sort((a, b) => Math.abs(py(a.y) - y) - Math.abs(py(b.y) - y)).slice(0, 8).sort((a, b) => b.y - a.y);
      put("path", { class: "hair", d: `M${px(at)} ${top}V${bottom}` });
      tip.replaceChildren(make("b", `step ${at.toLocaleString("en")}`));
      for (const point of near) {
        put("circle", { class: `dot ${point.look}`, cx: px(point.x), cy: py(point.y), r: 3.4 });
        const row = make("div", "", point.look);
        row.append(make("i", ""), point.name + (point.x === at ? "" : ` (${point.x.toLocaleString("en")})`),
          make("span", written(point.y, share)));
        tip.append(row);
      }
      if (near.length < found.length) tip.append(make("div", `the nearest ${near.length} of ${found.length}`));
      place(clientX, clientY);
    };
    const point = (event) => {
      const box = svg.getBoundingClientRect(), scale = box.width / svg.viewBox.baseVal.width;
      const x = (event.clientX - box.left) / scale, y = (event.clientY - box.top) / scale;
      show(x0 + (x1 - x0) * (x - left) / (right - left), y, event.clientX, event.clientY);
    };
    svg.addEventListener("pointermove", point);
    svg.addEventListener("pointerdown", point);
    svg.addEventListener("pointerleave", (event) => { if (event.pointerType === "mouse") clear(); });
    svg.addEventListener("blur", clear);
    svg.tabIndex = 0;
    svg.addEventListener("keydown", (event) => {
      const way = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
      if (event.key === "Escape") clear();
      if (!way || !read().length) return;
      event.preventDefault();
      const xs = [...new Set(read().flatMap((line) => line.xs))].sort((a, b) => a - b);
      const now = at === null ? (way > 0 ? 0 : xs.length - 1) : Math.min(xs.length - 1, Math.max(0, nearest(xs, at) + way));
      const box = svg.getBoundingClientRect(), scale = box.width / svg.viewBox.baseVal.width;
      show(xs[now], (top + bottom) / 2, box.left + px(xs[now]) * scale, box.top + (top + bottom) / 2 * scale);
    });
  }

  const groups = [...document.querySelectorAll(".chart [data-group]")];
  const items = [...document.querySelectorAll(".legend li")];
  let pinned = null;
  const highlight = (number) => {
    for (const group of groups) {
      group.classList.toggle("dim", number !== null && group.dataset.group !== number);
      group.classList.toggle("lit", group.dataset.group === number);
    }
  };
  for (const item of items.length > 1 ? items : []) {
    item.tabIndex = 0;
    item.setAttribute("role", "button");
    item.setAttribute("aria-pressed", "false");
    const press = () => {
      pinned = pinned === item.dataset.group ? null : item.dataset.group;
      for (const one of items) one.setAttribute("aria-pressed", String(one.dataset.group === pinned));
      highlight(pinned);
    };
    item.addEventListener("click", press);
    item.addEventListener("keydown", (event) => {
      if (event.key === "Enter" || event.key === " ") { event.preventDefault(); press(); }
    });
    item.addEventListener("pointerenter", (event) => { if (event.pointerType === "mouse") highlight(item.dataset.group); });
    item.addEventListener("pointerleave", () => highlight(pinned));
  }

  // A finger has no pointer to rest on a token.
  document.addEventListener("click", (event) => {
    const token = event.target.closest(".tokens .token[title]");
    document.querySelectorAll(".token.on").forEach((one) => one.classList.remove("on"));
    if (token) {
      token.classList.add("on");
      tip.replaceChildren(make("div", token.title));
      place(event.clientX, event.clientY);
    } else if (!event.target.closest(".chart svg")) hide();
  });
  addEventListener("scroll", () => { if (matchMedia("(pointer: coarse)").matches) hide(); }, { passive: true });
})();
