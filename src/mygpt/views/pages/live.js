// The page of `mygpt train --open`: the report of a training while it runs. Server-sent events bring
// the report's data, and at the end that of the complete report.

import { make, setText } from "../static/dom.js";
import { showReport } from "./report.js";

const LOST =
  "The connection to the training is lost. If it has ended, mygpt report RUN writes its report.";

follow(new EventSource("/events"));

function follow(source) {
  const words = make("p", { class: "live", role: "status" }, "Connecting.");
  document.getElementById("page").prepend(words);
  let newest = null;
  // A page that nobody sees takes no time from the training.
  const show = () => {
    if (!newest || document.hidden) return;
    setText(words, newest.live);
    showReport(newest);
    newest = null;
  };
  const take = ({ data }) => {
    newest = JSON.parse(data);
    show();
  };
  source.addEventListener("message", take);
  source.addEventListener("end", (event) => {
    source.close();
    take(event);
  });
  source.addEventListener("error", () => {
    if (newest) newest.live = LOST;
    setText(words, LOST);
  });
  document.addEventListener("visibilitychange", show);
}
