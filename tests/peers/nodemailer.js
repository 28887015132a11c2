// Sends mail with nodemailer as it is told on standard input: {"transport": {...}, "messages": [{...}, ...]}.
// Says on standard output, in JSON, what became of each message, in their order: {"response": ...} or {"error": ...}.
'use strict';
const nodemailer = require('nodemailer');

async function main() {
    let wishes = '';
    for await (const chunk of process.stdin) {
        wishes += chunk;
    }
    const { transport, messages } = JSON.parse(wishes);
    const sender = nodemailer.createTransport(transport);
    const results = messages.map(message =>
        sender.sendMail(message).then(
            ({ response, accepted, rejected }) => ({ response, accepted, rejected }),
            error => ({ error: error.message, code: error.code, status: error.responseCode })
        )
    );
    console.log(JSON.stringify(await Promise.all(results)));
    sender.close();
}

main();
