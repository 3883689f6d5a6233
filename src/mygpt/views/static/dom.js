// Create and change elements. Text is inserted as text, never as markup, and styles only through
// classes, SVG attributes and CSSOM, so that a strict Content-Security-Policy is possible.

const SVG_NAMESPACE = "http://www.w3.org/2000/svg";
const statesByKind = new Map();

// An HTML element with attributes; children are elements or strings.
export function make(name, attributes = {}, ...children) {
  return finished(document.createElement(name), attributes, children);
}

// An SVG element with attributes; children are elements or strings.
export function makeSvg(name, attributes = {}, ...children) {
  return finished(document.createElementNS(SVG_NAMESPACE, name), attributes, children);
}

// Set an attribute if it differs; null and false remove it, true sets it to the empty string.
export function setAttribute(element, name, value) {
  if (value === null || value === undefined || value === false) {
    element.removeAttribute(name);
    return;
  }
  const text = value === true ? "" : String(value);
  if (element.getAttribute(name) !== text) element.setAttribute(name, text);
}

// Set an element's text if it differs. Its text node is kept, since new nodes anywhere on a page
// end Chromium's present step of undo.
export function setText(element, text) {
  const { firstChild } = element;
  if (element.textContent === text) return;
  if (element.childNodes.length === 1 && firstChild.nodeType === Node.TEXT_NODE) {
    firstChild.data = text;
  } else element.textContent = text;
}

// The state of a view of this kind for an element; `build` creates it at the first call.
export function stateOf(kind, element, build) {
  if (!statesByKind.has(kind)) statesByKind.set(kind, new WeakMap());
  const states = statesByKind.get(kind);
  if (!states.has(element)) {
    element.replaceChildren();
    states.set(element, build(element));
  }
  return states.get(element);
}

// Give `parent` exactly `count` children: `create` makes missing ones, surplus ones are removed.
export function resizeChildren(parent, count, create) {
  while (parent.children.length > count) parent.lastElementChild.remove();
  while (parent.children.length < count) parent.append(create(parent.children.length));
}

// The index after an arrow, Home or End key, from `index` of `count`; null for other keys.
export function moved(key, index, count) {
  const steps = { ArrowLeft: -1, ArrowUp: -1, ArrowRight: 1, ArrowDown: 1 };
  if (key === "Home") return 0;
  if (key === "End") return count - 1;
  if (!(key in steps)) return null;
  return Math.min(count - 1, Math.max(0, index + steps[key]));
}

function finished(element, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) setAttribute(element, name, value);
  element.append(...children);
  return element;
}
