// What the page says, by language. Both have the same keys.

export const TEXTS = {
  en: {
    skip: "Skip to the message",
    language: "Language",
    conversation: "Conversation",
    introduction:
      "Every token of an answer is tinted by the layer that wrote it: the stronger the tint, the earlier it left the " +
      "model. Point at a token, or select the answer and use the arrow keys, to see its layer and confidence.",
    message: "Message",
    placeholder: "Ask something. Enter sends, Shift+Enter starts a new line, Escape stops.",
    send: "Send",
    stop: "Stop",
    clear: "New conversation",
    panel: "Settings and tokens by exit",
    settings: "Settings",
    task: "Task",
    noTask: "the server's default",
    mode: "Mode",
    modes: { default: "the server's rules", full: "full", threshold: "threshold", speculative: "speculative" },
    modeHelp: {
      default: "The server decides, by its configuration.",
      full: "Every token runs through all layers. This is the model's own answer.",
      threshold: "A token leaves at the first exit that is confident enough.",
      speculative: "An exit drafts and the full model verifies. The answer is the model's own.",
    },
    threshold: "Threshold",
    thresholdHelp: "Lower is faster, and differs more often from the model's own answer.",
    maxTokens: "Tokens at most",
    legend: "Which layer wrote the token",
    histogram: "Tokens by exit",
    exit: (layer) => `exit after layer ${layer}`,
    final: (layer) => `final exit (layer ${layer})`,
    token: (where, confidence) => `${where}, confidence ${confidence}`,
    answer: "Answer",
    fullAnswer: "Full mode's answer",
    compare: "Compare with full mode",
    comparing: "Asking full mode ...",
    same: "The answer is the same as full mode's.",
    sameSoFar: (tokens) => `The answer is the same as full mode's as far as both go (${tokens} tokens).`,
    departs: (number, total) => `Differs from full mode's from token ${number} on; differences are underlined (${total} tokens).`,
    facts: (tokens, seconds, rate) => `${tokens} tokens in ${seconds} s (${rate} tokens/s)`,
    layers: (run, all) => `${run} of ${all} layers per token`,
    drafts: (accepted, proposed) => `${accepted} of ${proposed} drafted tokens accepted`,
    certified: (task) => `covered by the certificate of ${task}`,
    uncertified: "not covered by a certificate",
    stopped: "stopped",
    cut: "ended at the token limit",
    totals: (tokens, mean) => `${tokens} tokens of this conversation; mean layer ${mean}`,
    none: "No tokens yet.",
    ready: (exits) => `ready, ${exits} exits`,
    noExits: "The model has no exits: every answer is full mode's.",
    lost: "The server cannot be reached.",
    broken: "The answer broke off before its end.",
    unexpected: (message) => `Something unexpected happened: ${message}`,
    failed: (message) => `The server refused the request: ${message}`,
  },
  ja: {
    skip: "メッセージ欄へ移動",
    language: "言語",
    conversation: "会話",
    introduction:
      "回答の各トークンには、出力した層に応じた色が付きます。色が濃いほど、早い層で出力されたことを示します。" +
      "トークンにポインターを合わせるか、回答を選んで矢印キーを押すと、層と確信度が表示されます。",
    message: "メッセージ",
    placeholder: "質問を入力してください。Enter で送信、Shift+Enter で改行、Esc で停止します。",
    send: "送信",
    stop: "停止",
    clear: "新しい会話",
    panel: "設定と出口ごとのトークン数",
    settings: "設定",
    task: "タスク",
    noTask: "指定しない（サーバーの既定）",
    mode: "モード",
    modes: { default: "サーバーの設定に従う", full: "フル", threshold: "しきい値", speculative: "投機" },
    modeHelp: {
      default: "サーバーの設定に従って決まります。",
      full: "すべてのトークンをすべての層で計算します。モデル本来の回答です。",
      threshold: "確信度が十分に高い最初の出口でトークンを出力します。",
      speculative: "出口がトークンを提案し、モデル全体が確認します。回答はモデル本来のものと同じです。",
    },
    threshold: "しきい値",
    thresholdHelp: "低くするほど速くなりますが、モデル本来の回答と異なることが増えます。",
    maxTokens: "最大トークン数",
    legend: "トークンを出力した層",
    histogram: "出口ごとのトークン数",
    exit: (layer) => `第 ${layer} 層の後の出口`,
    final: (layer) => `最終出口（第 ${layer} 層）`,
    token: (where, confidence) => `${where}、確信度 ${confidence}`,
    answer: "回答",
    fullAnswer: "フルモードの回答",
    compare: "フルモードと比べる",
    comparing: "フルモードで回答しています…",
    same: "フルモードの回答と同じです。",
    sameSoFar: (tokens) => `両方の回答がある範囲（${tokens} トークン）では、フルモードの回答と同じです。`,
    departs: (number, total) =>
      `${number} 番目のトークンからフルモードの回答と異なります。異なる箇所に下線を付けました（全 ${total} トークン）。`,
    facts: (tokens, seconds, rate) => `${tokens} トークン、${seconds} 秒（${rate} トークン/秒）`,
    layers: (run, all) => `1 トークンあたり ${all} 層中 ${run} 層を実行`,
    drafts: (accepted, proposed) => `提案された ${proposed} トークンのうち ${accepted} トークンを採用`,
    certified: (task) => `「${task}」の保証書の対象です`,
    uncertified: "保証書の対象外です",
    stopped: "停止しました",
    cut: "トークン数の上限に達しました",
    totals: (tokens, mean) => `この会話のトークン数 ${tokens}、終了層の平均 ${mean}`,
    none: "まだトークンはありません。",
    ready: (exits) => `準備完了（出口 ${exits} 個）`,
    noExits: "このモデルには出口がないため、回答はすべてフルモードのものです。",
    lost: "サーバーに接続できません。",
    broken: "回答が途中で切れました。",
    unexpected: (message) => `予期しないエラーが発生しました：${message}`,
    failed: (message) => `サーバーがリクエストを拒否しました：${message}`,
  },
};

const SAVED = "megatron_ee.language";

/** The language to start with: the one chosen before, else the browser's. */
export function firstLanguage() {
  const wanted = navigator.languages.map((each) => each.slice(0, 2));
  try {
    wanted.unshift(localStorage.getItem(SAVED));
  } catch {
    // The browser blocks storage.
  }
  return wanted.find((each) => each in TEXTS) ?? "en";
}

export function saveLanguage(language) {
  try {
    localStorage.setItem(SAVED, language);
  } catch {
    // It is not kept then.
  }
}
