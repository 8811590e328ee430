// Sorting, filtering, the details of a row, the theme. No library; everything is readable without it.
"use strict";

// ---- theme: what the system says, until the reader chooses

const root = document.documentElement;
const stored = (() => { try { return localStorage; } catch { return null; } })();
const THEMES = ["auto", "light", "dark"];

function setTheme(theme) {
  if (theme === "auto") delete root.dataset.theme; else root.dataset.theme = theme;
  const button = document.getElementById("theme");
  if (button) button.textContent = `Theme: ${theme}`;
  stored?.setItem("attnbench-theme", theme);
}

function startTheme() {
  let theme = stored?.getItem("attnbench-theme");
  if (!THEMES.includes(theme)) theme = "auto";
  setTheme(theme);
  const button = document.getElementById("theme");
  button.hidden = false;
  button.addEventListener("click", () => {
    theme = THEMES[(THEMES.indexOf(theme) + 1) % THEMES.length];
    setTheme(theme);
  });
}

// ---- sorting: a button in each head; rows without a figure stay last either way

function keyOf(row, column) {
  const cell = row.cells[column];
  if (!cell) return null;
  const value = cell.dataset.value;
  if (value !== undefined) return value === "" ? null : Number(value);
  return cell.textContent.trim().toLowerCase() || null;
}

function compare(a, b) {
  return typeof a === "number" && typeof b === "number" ? a - b : String(a).localeCompare(String(b), "en", { numeric: true });
}

function sortBy(table, head, descending) {
  const column = head.cellIndex;
  const body = table.tBodies[0];
  closeDetails(body);
  const rows = [...body.rows].map((row) => ({ row, key: keyOf(row, column) }));
  rows.sort((a, b) => {
    if (a.key === null || b.key === null) return (a.key === null) - (b.key === null);
    return descending ? compare(b.key, a.key) : compare(a.key, b.key);
  });
  body.append(...rows.map(({ row }) => row));
  for (const other of head.parentElement.cells) other.removeAttribute("aria-sort");
  head.setAttribute("aria-sort", descending ? "descending" : "ascending");
}

function startSorting() {
  for (const button of document.querySelectorAll("table th button[data-sort]")) {
    button.addEventListener("click", () => {
      const head = button.closest("th");
      const now = head.getAttribute("aria-sort");
      const descending = now ? now === "ascending" : button.dataset.sort === "descending";
      sortBy(button.closest("table"), head, descending);
    });
  }
}

// ---- filtering: a form names what it filters; an item carries a data attribute for each field

function applyFilters(form) {
  const wanted = [...form.elements].filter((field) => field.name && field.value);
  const items = document.querySelectorAll(form.dataset.filters);
  let shown = 0;
  for (const item of items) {
    const ok = wanted.every(({ name, value }) =>
      name === "search"
        ? value.toLowerCase().split(/\s+/).every((word) => item.textContent.toLowerCase().includes(word))
        : item.dataset[name] === undefined || item.dataset[name] === value);
    item.hidden = !ok;
    shown += ok;
    if (!ok) closeDetail(item);
  }
  const count = form.querySelector("output");
  if (count) count.textContent = `${shown} of ${items.length} ${count.dataset.noun}`;
}

function startFilters() {
  for (const form of document.querySelectorAll("form[data-filters]")) {
    for (const event of ["input", "change"]) form.addEventListener(event, () => applyFilters(form));
    form.addEventListener("submit", (event) => event.preventDefault());
    form.addEventListener("reset", () => setTimeout(() => applyFilters(form)));
    form.hidden = false;
  }
}

// ---- the details of a row, made of text alone

const data = document.getElementById("rows");
const { rows: details, findings: FINDINGS, names: NAMES, environment: ENVIRONMENT } = data ? JSON.parse(data.textContent) : {};

function element(tag, text, className) {
  const made = document.createElement(tag);
  if (text !== undefined) made.textContent = text;
  if (className) made.className = className;
  return made;
}

function block(title, ...content) {
  const made = element("div");
  made.append(element("h4", title), ...content);
  return made;
}

function list(lines) {
  const made = element("ul");
  made.append(...lines.map((line) => element("li", line)));
  return made;
}

function facts(pairs) {
  const made = element("dl", undefined, "facts");
  for (const [name, text] of pairs) made.append(element("dt", name), element("dd", text));
  return made;
}

function sheetOf(row) {
  const sheet = element("div", undefined, "sheet");
  if (row.reasons.length) sheet.append(block(row.status === "OK" ? "Refused" : `Why ${row.status}`, list(row.reasons)));
  if (row.warnings.length) sheet.append(block("Warnings", list(row.warnings)));
  sheet.append(block("Measured", facts(row.facts.map(([number, text]) => [NAMES[number], text]))));
  if (row.findings.length) sheet.append(block("Rules of a row", facts(row.findings.map((number) => FINDINGS[number]).map(([rule, state, why]) => [rule, `${state}: ${why}`]))));
  sheet.append(block("Environment", facts(ENVIRONMENT)));
  if (row.evidence) { const wide = block("Evidence", element("pre", row.evidence)); wide.className = "wide"; sheet.append(wide); }
  const commands = block("Measure it again", element("pre", row.command), element("pre", `bench verify ${row.address}`));
  commands.className = "wide";
  sheet.append(commands);
  return sheet;
}

function closeDetail(row) {
  const button = row.querySelector?.("button.open[aria-expanded=true]");
  if (!button) return;
  button.setAttribute("aria-expanded", "false");
  row.nextElementSibling?.classList.contains("detail") && row.nextElementSibling.remove();
}

function closeDetails(body) {
  for (const row of [...body.rows]) closeDetail(row);
}

function openDetail(row) {
  const button = row.querySelector("button.open");
  if (!button || button.getAttribute("aria-expanded") === "true") return;
  const detail = element("tr", undefined, "detail");
  const cell = element("td");
  cell.colSpan = row.cells.length;
  cell.append(sheetOf(details[row.dataset.place]));
  detail.append(cell);
  row.after(detail);
  button.setAttribute("aria-expanded", "true");
}

function startDetails() {
  for (const button of document.querySelectorAll("button.open")) {
    button.addEventListener("click", () => {
      const row = button.closest("tr");
      if (button.getAttribute("aria-expanded") === "true") closeDetail(row); else openDetail(row);
    });
  }
}

// ---- addresses: #impl=NAME&mask=causal sets the filters, #row-ADDRESS opens a row

function followAddress() {
  const address = decodeURIComponent(location.hash.slice(1));
  if (address.startsWith("row-")) {
    const row = document.getElementById(address);
    if (row) { row.hidden = false; openDetail(row); row.scrollIntoView({ block: "start" }); }
  } else if (address.includes("=")) {
    const form = document.querySelector("form[data-filters]");
    if (!form) return;
    form.reset();
    for (const [name, value] of new URLSearchParams(location.hash.slice(1))) {
      const field = form.elements.namedItem(name);
      if (field) field.value = value;
    }
    applyFilters(form);
    form.scrollIntoView({ block: "start" });
  }
}

startTheme();
startSorting();
startFilters();
startDetails();
addEventListener("hashchange", followAddress);
followAddress();
